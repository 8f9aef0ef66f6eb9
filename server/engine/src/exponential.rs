//! The exponential for passes over a row of logits: the same bits on every machine, and a loop over it becomes vector
//! instructions, which one over the library's does not.

/// `e` to the power of `x`, for `x` at most 0; within two units in the last place, and 0 below -87.
///
/// `x = n ln 2 + r` with a whole `n`; `e^r` by its Taylor polynomial, whose rest for `|r| <= ln 2 / 2` is below
/// `r^8 / 8! < 6e-9`; `2^n` by its bits (Cody and Waite, Software Manual for the Elementary Functions, 1980, chapter 6).
#[inline]
pub(crate) fn exp_below_zero(x: f32) -> f32 {
    /// Adding it leaves no place for a fraction, and its lowest bits count from 0.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has so few bits that its product with `n` is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut power = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        power = power * r + coefficient;
    }
    let two_to_n = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.0 { 0.0 } else { power * two_to_n }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential() {
        let mut worst = 0.0_f64;
        for i in 0..=870_000 {
            let x = i as f32 * -1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_below_zero(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "relative error {worst}");
        assert_eq!(exp_below_zero(0.0), 1.0);
        for x in [-87.5, -1e6, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp_below_zero(x), 0.0, "{x}");
        }
    }
}
