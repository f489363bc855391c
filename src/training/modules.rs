//! Modules of burn as weights, for trainers that users write themselves.
//!
//! Every `f32` parameter is one tensor of the layout, in the order and under the names of the module's fields:
//! `hidden.weight` is the `weight` of the field `hidden`. Shapes are burn's own; a `Linear` has `[in, out]`.

use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};

use super::{TrainError, check_layout};
use crate::weights::{Layout, TensorSpec, Weights};

/// The values of a module's parameters.
///
/// # Panics
/// If a parameter is not made of `f32`.
pub fn weights_of(module: &impl Module) -> Weights {
    let mut reader = Reader::default();
    module.visit(&mut reader);
    Weights::new(Arc::new(reader.layout), reader.values).expect("every tensor has as many values as its shape says")
}

/// The module with these values; refuses those of another module.
pub fn with_weights<M: Module>(module: M, weights: &Weights) -> Result<M, TrainError> {
    let mut reader = Reader::default();
    module.visit(&mut reader);
    check_layout(&reader.layout, weights.layout())?;
    Ok(module.map(&mut Writer { rest: weights.values() }))
}

#[derive(Default)]
struct Reader {
    path: Vec<String>,
    layout: Layout,
    values: Vec<f32>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        self.layout.tensors.push(TensorSpec { name: self.path.join("."), shape: tensor.dims().to_vec() });
        self.values.extend(tensor.into_data().try_into_vec::<f32>().expect("parameters are f32"));
    }
}

/// Hands out values in the order in which the reader took them.
struct Writer<'a> {
    rest: &'a [f32],
}

impl ModuleMapper for Writer<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let (dims, device, has_gradient) = (tensor.dims(), tensor.device(), tensor.is_require_grad());
            let (values, rest) = self.rest.split_at(dims.iter().product());
            self.rest = rest;
            Tensor::from_data(TensorData::new(values.to_vec(), dims), &device).set_require_grad(has_gradient)
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    #[derive(Module, Debug)]
    struct Net {
        hidden: Linear,
        outputs: Vec<Linear>,
    }

    fn net(width: usize) -> Net {
        let device = Device::flex().autodiff();
        let outputs = (0..2).map(|_| LinearConfig::new(width, 1).with_bias(false).init(&device)).collect();
        Net { hidden: LinearConfig::new(2, width).init(&device), outputs }
    }

    #[test]
    fn names_are_those_of_the_fields() {
        let weights = weights_of(&net(3));
        let names: Vec<&str> = weights.layout().tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["hidden.weight", "hidden.bias", "outputs.0.weight", "outputs.1.weight"]);
        assert_eq!(weights.layout().tensors[0].shape, [2, 3]);
    }

    #[test]
    fn values_survive_the_way_there_and_back_and_still_have_gradients() {
        let values: Vec<f32> = (0..15).map(|value| value as f32).collect();
        let weights = Weights::new(weights_of(&net(3)).layout().clone(), values).unwrap();
        let net = with_weights(net(3), &weights).unwrap();
        assert_eq!(weights_of(&net), weights);
        let x = Tensor::<2>::ones([1, 2], &Device::flex().autodiff());
        let gradients = net.hidden.forward(x).sum().backward();
        assert!(net.hidden.weight.val().grad(&gradients).is_some());
    }

    #[test]
    fn weights_of_another_module_are_refused() {
        let error = with_weights(net(3), &weights_of(&net(4))).unwrap_err().to_string();
        assert!(error.contains("hidden.weight [2, 4]"), "{error}");
    }
}
