//! Strategies by name: which rule, which optimiser, and what travels with models and updates.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Method, Rule, ServerOptimizer};
use crate::weights::{Layout, TensorSpec, Weights};

/// How updates become the next global model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Strategy {
    /// How they become one.
    pub rule: Rule,
    /// How the next model follows from that one and the parent.
    pub optimizer: ServerOptimizer,
}

/// What stands in the blob of a global model, in this order. Each section is as long as the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// The model.
    Model,
    /// The server optimiser's direction.
    Momentum,
    /// The server optimiser's moving mean (or sum) of squares.
    SecondMoment,
    /// The sum of all peers' control variates.
    Control,
}

/// What the keys of a strategy say, whichever of them it reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameters {
    /// See [`Rule::TrimmedMean`].
    pub trim: f64,
    /// See [`Rule::Krum`].
    pub byzantine: usize,
    /// See [`Rule::NormClip`].
    pub clip_norm: Option<f64>,
    /// The server optimiser; `None`: the one that the strategy's name stands for.
    pub server_optimizer: Option<Method>,
    /// `None`: the [method's own](Method::default_learning_rate).
    pub server_learning_rate: Option<f64>,
    /// See [`ServerOptimizer::momentum`].
    pub server_momentum: f64,
    /// See [`ServerOptimizer::beta2`].
    pub server_beta2: f64,
    /// See [`ServerOptimizer::tau`].
    pub server_tau: f64,
}

/// A name and parameters that are no strategy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StrategyError {
    /// No strategy has this name.
    #[error("{0:?} is no strategy (known: {known})", known = Strategy::NAMES.join(", "))]
    Unknown(String),
    /// The strategy is another server optimiser already, or its paper has none.
    #[error("strategy {strategy} does not go with server optimiser {optimizer}: {why}")]
    Optimizer {
        /// The strategy.
        strategy: String,
        /// The optimiser.
        optimizer: Method,
        /// Why, and what to choose instead.
        why: &'static str,
    },
}

impl Default for Parameters {
    fn default() -> Self {
        let ServerOptimizer { momentum, beta2, tau, .. } = ServerOptimizer::default();
        Self {
            trim: 0.2,
            byzantine: 1,
            clip_norm: None,
            server_optimizer: None,
            server_learning_rate: None,
            server_momentum: momentum,
            server_beta2: beta2,
            server_tau: tau,
        }
    }
}

impl Section {
    /// What names of its tensors begin with in a model's blob.
    fn prefix(self) -> &'static str {
        match self {
            Section::Model => "",
            Section::Momentum => "server.momentum.",
            Section::SecondMoment => "server.second_moment.",
            Section::Control => "server.control.",
        }
    }
}

impl Strategy {
    /// The names that [`named`](Self::named) takes, the default first.
    pub const NAMES: &'static [&'static str] = &[
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "scaffold",
        "fednova",
        "median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "bulyan",
        "norm-clip",
    ];

    /// The strategy of that name. `fedprox` aggregates as `fedavg`: what it adds is a part of local training.
    pub fn named(name: &str, parameters: &Parameters) -> Result<Self, StrategyError> {
        let byzantine = parameters.byzantine;
        let (rule, own) = match name {
            "fedavg" | "fedprox" => (Rule::FedAvg, Method::None),
            "fedavgm" => (Rule::FedAvg, Method::Momentum),
            "fedadagrad" => (Rule::FedAvg, Method::Adagrad),
            "fedadam" => (Rule::FedAvg, Method::Adam),
            "fedyogi" => (Rule::FedAvg, Method::Yogi),
            "scaffold" => (Rule::Scaffold, Method::None),
            "fednova" => (Rule::FedNova, Method::None),
            "median" => (Rule::Median, Method::None),
            "trimmed-mean" => (Rule::TrimmedMean { trim: parameters.trim }, Method::None),
            "krum" => (Rule::Krum { byzantine }, Method::None),
            "multi-krum" => (Rule::MultiKrum { byzantine }, Method::None),
            "bulyan" => (Rule::Bulyan { byzantine }, Method::None),
            "norm-clip" => (Rule::NormClip { norm: parameters.clip_norm }, Method::None),
            _ => return Err(StrategyError::Unknown(name.to_owned())),
        };
        let method = parameters.server_optimizer.unwrap_or(own);
        let refuse = |why| Err(StrategyError::Optimizer { strategy: name.to_owned(), optimizer: method, why });
        if own != Method::None && method != own {
            return refuse("its name stands for another; choose strategy fedavg to name the optimiser yourself");
        }
        if rule == Rule::Scaffold && method != Method::None {
            return refuse("its control variates correct plain steps; server_learning_rate alone is read");
        }
        let optimizer = ServerOptimizer {
            method,
            learning_rate: parameters.server_learning_rate.unwrap_or(method.default_learning_rate()),
            momentum: parameters.server_momentum,
            beta2: parameters.server_beta2,
            tau: parameters.server_tau,
        };
        Ok(Self { rule, optimizer })
    }

    /// Its name: `fedadam` for the mean with Adam, as its paper has it; for the others their rule's.
    pub fn name(&self) -> &'static str {
        match (self.rule, self.optimizer.method) {
            (Rule::FedAvg, Method::Momentum) => "fedavgm",
            (Rule::FedAvg, Method::Adagrad) => "fedadagrad",
            (Rule::FedAvg, Method::Adam) => "fedadam",
            (Rule::FedAvg, Method::Yogi) => "fedyogi",
            (rule, _) => rule.name(),
        }
    }

    /// Every key as text, for peers to compare; `unused` where the strategy does not read it.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let Self { rule, optimizer } = *self;
        let used = |value: Option<String>| value.unwrap_or_else(|| "unused".into());
        let when = |reads: bool, value: f64| used(reads.then(|| value.to_string()));
        let trim = if let Rule::TrimmedMean { trim } = rule { Some(trim.to_string()) } else { None };
        let byzantine = match rule {
            Rule::Krum { byzantine } | Rule::MultiKrum { byzantine } | Rule::Bulyan { byzantine } => {
                Some(byzantine.to_string())
            }
            _ => None,
        };
        let clip_norm = match rule {
            Rule::NormClip { norm } => Some(norm.map_or_else(|| "none".into(), |norm| norm.to_string())),
            _ => None,
        };
        let has_moving_mean = matches!(optimizer.method, Method::Adam | Method::Yogi);
        let entries = [
            ("strategy", self.name().to_owned()),
            ("trim", used(trim)),
            ("byzantine", used(byzantine)),
            ("clip_norm", used(clip_norm)),
            ("server_optimizer", optimizer.method.to_string()),
            ("server_learning_rate", optimizer.learning_rate.to_string()),
            ("server_momentum", when(optimizer.method != Method::None, optimizer.momentum)),
            ("server_beta2", when(has_moving_mean, optimizer.beta2)),
            ("server_tau", when(optimizer.method.is_adaptive(), optimizer.tau)),
        ];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// What stands in a model's blob, in order.
    pub fn sections(&self) -> impl Iterator<Item = Section> + use<> {
        let Self { rule, optimizer } = *self;
        let all = [
            (Section::Model, true),
            (Section::Momentum, optimizer.method != Method::None),
            (Section::SecondMoment, optimizer.method.is_adaptive()),
            (Section::Control, rule == Rule::Scaffold),
        ];
        all.into_iter().filter(|(_, is_there)| *is_there).map(|(section, _)| section)
    }

    /// Whether something stands behind the model in its blob.
    pub fn has_state(&self) -> bool {
        self.sections().count() > 1
    }

    /// Whether updates bring what [`Section::Control`] is made of.
    pub fn has_control(&self) -> bool {
        self.rule == Rule::Scaffold
    }

    /// Whether an aggregate depends on its parent.
    pub fn reads_parent(&self) -> bool {
        self.rule.reads_parent() || !self.optimizer.is_identity()
    }

    /// What a model's blob holds, if the model itself is of `layout`.
    pub fn model_layout(&self, layout: &Arc<Layout>) -> Arc<Layout> {
        if !self.has_state() {
            return Arc::clone(layout);
        }
        let tensors = self.sections().flat_map(|section| named_after(layout, section.prefix()));
        Arc::new(Layout { tensors: tensors.collect() })
    }

    /// What an update's blob holds, if the model is of `layout`.
    pub fn update_layout(&self, layout: &Arc<Layout>) -> Arc<Layout> {
        if !self.has_control() {
            return Arc::clone(layout);
        }
        Arc::new(Layout { tensors: named_after(layout, "").chain(named_after(layout, "control.")).collect() })
    }

    /// What the first model's blob holds, of which nothing is remembered.
    pub fn initial(&self, model: Weights) -> Weights {
        if !self.has_state() {
            return model;
        }
        let (layout, len) = (model.layout().clone(), model.values().len());
        let mut values = model.into_values();
        for section in self.sections().skip(1) {
            let value = if section == Section::SecondMoment { self.optimizer.second_moment_at_first() } else { 0.0 };
            values.resize(values.len() + len, value);
        }
        Weights::new(self.model_layout(&layout), values).expect("each section is as long as the model")
    }
}

fn named_after(layout: &Layout, prefix: &str) -> impl Iterator<Item = TensorSpec> {
    layout
        .tensors
        .iter()
        .map(move |tensor| TensorSpec { name: format!("{prefix}{}", tensor.name), shape: tensor.shape.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Strategy {
        Strategy::named(name, &Parameters::default()).unwrap()
    }

    fn layout() -> Arc<Layout> {
        let tensor = |name: &str, values| TensorSpec { name: name.into(), shape: vec![values] };
        Arc::new(Layout { tensors: vec![tensor("a", 2), tensor("b", 1)] })
    }

    #[test]
    fn every_strategy_has_its_name_and_an_unknown_one_lists_the_known() {
        for name in Strategy::NAMES {
            let expected = if *name == "fedprox" { "fedavg" } else { name };
            assert_eq!(named(name).name(), expected);
        }
        let error = Strategy::named("fedavrg", &Parameters::default()).unwrap_err().to_string();
        assert!(error.starts_with("\"fedavrg\" is no strategy (known: fedavg, fedprox, "), "{error}");
        assert_eq!(Strategy::default(), named("fedavg"));
    }

    #[test]
    fn any_rule_but_scaffold_takes_a_server_optimiser() {
        let with = |name, method| {
            Strategy::named(name, &Parameters { server_optimizer: Some(method), ..Parameters::default() })
        };
        assert_eq!(with("fedavg", Method::Adam), Ok(named("fedadam")));
        assert_eq!(with("median", Method::Momentum).unwrap().optimizer.method, Method::Momentum);
        assert_eq!(with("fedyogi", Method::Yogi), Ok(named("fedyogi")));
        assert!(with("fedyogi", Method::Adam).unwrap_err().to_string().contains("choose strategy fedavg"));
        assert!(with("scaffold", Method::Adam).is_err());
    }

    #[test]
    fn only_keys_that_are_read_are_compared() {
        let entries = named("trimmed-mean").entries();
        assert_eq!((entries["trim"].as_str(), entries["byzantine"].as_str()), ("0.2", "unused"));
        let other = Strategy::named("fedavg", &Parameters { byzantine: 3, ..Parameters::default() }).unwrap();
        assert_eq!(other.entries(), named("fedavg").entries());
        assert_ne!(named("krum").entries(), named("bulyan").entries());
    }

    #[test]
    fn state_stands_behind_the_model() {
        let names = |layout: Arc<Layout>| layout.tensors.iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
        assert_eq!(
            names(named("fedavgm").model_layout(&layout())),
            ["a", "b", "server.momentum.a", "server.momentum.b"]
        );
        assert_eq!(named("fedadam").model_layout(&layout()).len(), 9);
        assert_eq!(named("fedadam").update_layout(&layout()), layout());
        assert_eq!(names(named("scaffold").update_layout(&layout())), ["a", "b", "control.a", "control.b"]);
        assert_eq!(named("scaffold").model_layout(&layout()).len(), 6);
        assert!(Arc::ptr_eq(&named("median").model_layout(&layout()), &layout()) || !named("median").has_state());
    }

    #[test]
    fn the_first_blob_remembers_nothing() {
        let model = Weights::new(layout(), vec![1.0, 2.0, 3.0]).unwrap();
        let initial = named("fedadam").initial(model.clone());
        assert_eq!(initial.values()[..6], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]);
        assert_eq!(initial.values()[6..], [1e-6; 3]);
        assert_eq!(named("fedavg").initial(model.clone()), model);
    }
}
