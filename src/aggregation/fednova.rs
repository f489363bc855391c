//! FedNova: normalised averaging (Wang et al. 2020, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated
//! Optimization*, arXiv 2007.07481, equations 7 and 8).
//!
//! Who makes more local steps moves farther, and in a plain mean pulls the model to its own optimum. FedNova averages
//! directions, `d_k = (w_parent − w_k) / a_k`, and goes as far as the mean peer went: `w = w_parent − (Σ p_k · a_k) · Σ p_k · d_k`
//! with `p_k = n_k / Σ n` and `a_k` the [sum of the steps](super::Share::step_sum) (the paper's `‖a_k‖₁`, here in units of the
//! learning rate, which cancels out).

use super::{Share, fedavg};

/// Each update's factor; the parent's is what they lack to 1.
pub(super) fn factors(shares: &[Share]) -> Vec<f64> {
    let shares_of_data = fedavg::factors(shares);
    let weighted = || shares_of_data.iter().zip(shares);
    let mean_steps: f64 = weighted().map(|(p, share)| p * share.step_sum).sum();
    weighted().map(|(p, share)| mean_steps * p / share.step_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(num_examples: u64, step_sum: f64) -> Share {
        Share { num_examples, step_sum }
    }

    #[test]
    fn with_as_many_steps_everywhere_it_is_fedavg() {
        let shares = [share(1, 2.5), share(3, 2.5)];
        assert_eq!(factors(&shares), fedavg::factors(&shares));
    }

    #[test]
    fn it_is_the_papers_formula() {
        // Two peers of as much data, 10 and 30 steps away from w = 0: the mean peer makes 20 steps.
        let factors = factors(&[share(5, 10.0), share(5, 30.0)]);
        let (w_1, w_2) = (-10.0 * 1.0, -30.0 * 4.0); // directions 1 and 4
        let model = factors[0] * w_1 + factors[1] * w_2;
        assert!((model - -20.0 * (0.5 * 1.0 + 0.5 * 4.0)).abs() < 1e-12);
    }
}
