//! SCAFFOLD (Karimireddy et al. 2020, *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, arXiv 1910.06378,
//! Algorithm 1 with option II): control variates correct the drift of peers whose data differ.
//!
//! Every peer keeps a control variate `c_k`, its own mean gradient, and the model carries the sum of all, which makes their mean
//! `c` over the `N` members of a round. Local gradients are corrected by `c − c_k`. After training from `x` to `y_k` by steps that
//! sum up to `s` (`K · learning_rate` without momentum), `c_k⁺ = c_k − c + (x − y_k) / s`. The update brings `y_k` and `c_k⁺ − c_k`;
//! the aggregate is `x + η · (mean y_k − x)`, and the sum grows by `Σ (c_k⁺ − c_k)`: who did not train counts by its old one. As in
//! the paper all peers count alike, whatever their examples.
//!
//! With momentum `s` counts each learning rate as often as momentum repeats its gradient, so that `(x − y_k) / s` stays a mean
//! of gradients.
//!
//! The paper's peers are always the same. Here newcomers begin with `c_k = 0`, and because the model carries the sum rather than
//! the mean, it stays that of all members. Who leaves for good does not take its part along, which nobody else knows: its last
//! gradient goes on counting, and the model stays near the minimum of all, as if it were still there.

/// The peer's own new control variate, in place of its old one: `c_k⁺` from `c_k`, `c`, `x` and `y_k`. All are as long.
pub fn advance_control(own: &mut [f32], common: &[f32], start: &[f32], end: &[f32], step_sum: f64) {
    for (((own, common), start), end) in own.iter_mut().zip(common).zip(start).zip(end) {
        let gradient = (f64::from(*start) - f64::from(*end)) / step_sum;
        *own = (f64::from(*own) - f64::from(*common) + gradient) as f32;
    }
}

/// The mean of all members' control variates, from their sum, in its place.
pub fn common_control(sum: &mut [f32], members: usize) {
    sum.iter_mut().for_each(|value| *value = (f64::from(*value) / members.max(1) as f64) as f32);
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
    fn all_members_share_the_sum() {
        let mut sum = [8.0, -2.0];
        common_control(&mut sum, 4);
        assert_eq!(sum, [2.0, -0.5]);
    }
}
