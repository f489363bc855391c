//! SCAFFOLD (Karimireddy et al. 2020, *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, arXiv 1910.06378,
//! Algorithm 1 with option II): control variates correct the drift of peers whose data differ.
//!
//! Every peer keeps a control variate `c_k`, its own mean gradient, and the model carries `c`, the mean of all. Local gradients
//! are corrected by `c − c_k`. After training from `x` to `y_k` by steps that sum up to `s` (`K · learning_rate` without
//! momentum), `c_k⁺ = c_k − c + (x − y_k) / s`. The update brings `y_k` and `c_k⁺ − c_k`; the aggregate is
//! `x + η · (mean y_k − x)` and `c + Σ (c_k⁺ − c_k) / N` with `N` all members of the round, also those that did not train. As
//! in the paper all peers count alike, whatever their examples.
//!
//! With momentum `s` counts each learning rate as often as momentum repeats its gradient, so that `(x − y_k) / s` stays a mean
//! of gradients. Peers begin with `c_k = 0`, which keeps `c` the mean of all also when newcomers come; when members leave, what
//! they brought to `c` stays.

/// The peer's own new control variate, in place of its old one: `c_k⁺` from `c_k`, `c`, `x` and `y_k`. All are as long.
pub fn advance_control(own: &mut [f32], common: &[f32], start: &[f32], end: &[f32], step_sum: f64) {
    for (((own, common), start), end) in own.iter_mut().zip(common).zip(start).zip(end) {
        let gradient = (f64::from(*start) - f64::from(*end)) / step_sum;
        *own = (f64::from(*own) - f64::from(*common) + gradient) as f32;
    }
}

/// The new common control variate from the old one and the sum of what the updates bring.
pub(super) fn common(old: f32, sum: f32, members: usize) -> f32 {
    (f64::from(old) + f64::from(sum) / members.max(1) as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_one_plain_step_the_control_is_the_gradient() {
        // y = x − lr · (g − c_k + c) with lr 0.5, g = 3, c_k = 1, c = 2.
        let mut own = [1.0];
        advance_control(&mut own, &[2.0], &[10.0], &[10.0 - 0.5 * 4.0], 0.5);
        assert_eq!(own, [3.0]);
    }

    #[test]
    fn what_few_bring_counts_for_few() {
        assert_eq!(common(1.0, 8.0, 4), 3.0);
    }
}
