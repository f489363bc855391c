//! A recurrent network that tells the next token of a text at each of its places (Hochreiter and Schmidhuber, *Long
//! Short-Term Memory*, 1997; as in McMahan et al., 2017, for the plays of Shakespeare).

use burn::tensor::{Int, Tensor};

use super::layers::{Embedding, Linear, Lstm, rows_of};
use super::tensors::{Declared, Pass};

/// `embedding.weight` `[vocabulary, dim]`, `lstm.weight_ih_l0` `[4 hidden, dim]`, `lstm.weight_hh_l0`, `lstm.bias_ih_l0`,
/// `lstm.bias_hh_l0`, the same of further layers, and `fc.weight` `[vocabulary, hidden]`, `fc.bias`.
#[derive(Clone, Debug)]
pub(in crate::training) struct CharLstm {
    embedding: Embedding,
    layers: Vec<Lstm>,
    fc: Linear,
    hidden: usize,
}

impl CharLstm {
    /// With `layers` layers of `hidden` cells, for texts of a vocabulary of so many tokens.
    pub(super) fn new(vocabulary: usize, embedding_dim: usize, hidden: usize, layers: usize) -> Self {
        let inputs = |layer| if layer == 0 { embedding_dim } else { hidden };
        Self {
            embedding: Embedding::new("embedding", vocabulary, embedding_dim),
            layers: (0..layers).map(|layer| Lstm::new("lstm", layer, inputs(layer), hidden)).collect(),
            fc: Linear::new("fc", hidden, vocabulary),
            hidden,
        }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let layers = self.layers.iter().flat_map(Lstm::declare);
        self.embedding.declare().into_iter().chain(layers).chain(self.fc.declare()).collect()
    }

    /// Token numbers `[batch, steps]` to `[batch × steps, vocabulary]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let [batch, steps] = x.dims();
        let tokens: Tensor<2, Int> = x.int();
        let gates: Vec<_> = self.layers.iter().map(|layer| layer.gates(pass)).collect();
        let mut states: Vec<_> = self.layers.iter().map(|layer| layer.start(batch, pass)).collect();
        // What each token of the vocabulary adds to the first layer's gates: fewer rows than there are steps to compute.
        let tables = gates[0].of_inputs(&self.embedding.table(pass));
        let mut outputs = Vec::with_capacity(steps);
        for step in 0..steps {
            let now = tokens.clone().narrow(1, step, 1).reshape([batch]);
            let mut below = None;
            for (gates, state) in gates.iter().zip(&mut states) {
                let inputs = below.map_or_else(|| rows_of(&tables, &now), |output| gates.of_inputs(&output));
                *state = gates.step(inputs, state);
                below = Some(state.output());
            }
            outputs.extend(below.map(|output| output.unsqueeze_dim::<3>(1)));
        }
        self.fc.forward(pass, Tensor::cat(outputs, 1).reshape([batch * steps, self.hidden]))
    }
}
