//! A model and data of one's own: all that it takes to train them with rodizio, in three peers of this process.
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor, TensorData, activation::tanh};
use rodizio::cluster::{Cluster, Stop, start_broker};
use rodizio::config::{Layers, Settings};
use rodizio::events::{Entry, Event};
use rodizio::training::{OnProgress, Progress, TrainError, Trainer, modules};
use rodizio::types::{Metrics, Round};
use rodizio::weights::Weights;

#[derive(Module, Debug)]
struct Net {
    hidden: Linear,
    output: Linear,
}
/// A peer that knows the sine on a stretch of its own, and shows its points to nobody.
struct Sine {
    net: Net,
    x: Tensor<2>,
    y: Tensor<2>,
}
impl Sine {
    fn new(settings: &Settings) -> Self {
        let (device, part) = (Device::flex().autodiff(), settings.part.expect("each peer of a cluster has a part"));
        let x = (0..64).map(|i| ((part.index - 1) as f32 + i as f32 / 64.0) / part.of as f32).collect::<Vec<_>>();
        let y = x.iter().map(|x| (6.3 * x).sin()).collect::<Vec<_>>();
        device.seed(42); // all start from the weights of one of them: which one depends on who leads
        let column = |values| Tensor::from_data(TensorData::new(values, [64, 1]), &device);
        let net =
            Net { hidden: LinearConfig::new(1, 32).init(&device), output: LinearConfig::new(32, 1).init(&device) };
        Self { net, x: column(x), y: column(y) }
    }

    fn loss(&self) -> Tensor<1> {
        let told = self.net.output.forward(tanh(self.net.hidden.forward(self.x.clone() * 4.0 - 2.0)));
        (told - self.y.clone()).square().mean()
    }
}
impl Trainer for Sine {
    fn num_examples(&self) -> u64 {
        64
    }
    fn weights(&self) -> Weights {
        modules::weights_of(&self.net)
    }
    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        self.net = modules::with_weights(self.net.clone(), weights)?;
        Ok(())
    }
    fn train(&mut self, _: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        let mut optimizer = SgdConfig::new().init();
        for done in 1..=100 {
            let gradients = GradientsParams::from_grads(self.loss().backward(), &self.net);
            self.net = optimizer.step(0.02, self.net.clone(), gradients);
            let _ = on_progress(Progress { done, total: 100 });
        }
        self.evaluate()
    }
    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        Ok(Metrics { num_examples: 64, loss: self.loss().into_scalar::<f32>().into(), ..Metrics::default() })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_peers_learn_what_none_of_them_has_seen() {
    let (dir, broker) = (tempfile::tempdir().unwrap(), start_broker("127.0.0.1:0", 3, 1 << 16).await.unwrap());
    let (brokers, defaults) = (vec![broker.addr().to_string()], Layers::new().settings().unwrap());
    let settings = Settings { peers: 3, min_peers: 3, rounds: 20, leader_trains: true, brokers, ..defaults };
    let cluster = Cluster::of_trainers(&settings, dir.path(), |peer| Ok(Box::new(Sine::new(peer)))).unwrap();
    let (entries, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (_stop, stop) = Stop::new();
    let limit = std::time::Duration::from_secs(600); // they take seconds
    tokio::time::timeout(limit, cluster.run(&stop, &entries)).await.expect("the peers do not end");
    let loss = |entry: Entry| if let Event::RoundCommitted(round) = entry.event { round.val_loss } else { None };
    let losses: Vec<f64> = std::iter::from_fn(|| told.try_recv().ok()).filter_map(loss).collect();
    assert!(losses.last() < losses.first().map(|first| first / 2.0).as_ref(), "{losses:?}");
}
