//! The kinds of values a setting can have: how each is read from text and written back. `config` lists the settings;
//! this file must not know any of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use espalier_engine::device::DeviceChoice;
use espalier_engine::model::Dtype;

/// A kind of value. `show` gives what `parse` reads, as a TOML value.
pub(crate) trait Value: Sized {
    /// Never printed.
    const SECRET: bool = false;
    /// May stand as a flag without a value.
    const SWITCH: bool = false;

    /// The value, or what was expected, to be put behind "is not".
    fn parse(text: &str) -> Result<Self, String>;

    /// As a TOML value.
    fn show(&self) -> String;

    /// True when the value lies in the closed range; kinds without order lie in every range.
    fn within(&self, _min: &Self, _max: &Self) -> bool {
        true
    }
}

/// A number of bytes; written `4MiB`, `512KiB`, `1GiB` or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// As a length in memory, saturating on machines whose `usize` is smaller.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// An address or nothing; written `off` for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaybeAddr(pub Option<SocketAddr>);

/// A format of weights, or `auto`: what the device likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaybeDtype(pub Option<Dtype>);

/// A path or nothing; written empty for nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaybePath(pub Option<PathBuf>);

/// A credential: it can be revealed on purpose and is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Option<String>);

impl Secret {
    /// A credential; an empty text is none.
    pub fn new(text: &str) -> Secret {
        Secret((!text.is_empty()).then(|| text.to_owned()))
    }

    /// The credential itself.
    pub fn reveal(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() {
            "Secret(set)"
        } else {
            "Secret(unset)"
        })
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

macro_rules! whole_numbers {
    ($($ty:ty),+) => {$(
        impl Value for $ty {
            fn parse(text: &str) -> Result<Self, String> {
                text.trim().replace('_', "").parse().map_err(|_| "a whole number".to_owned())
            }

            fn show(&self) -> String {
                self.to_string()
            }

            fn within(&self, min: &Self, max: &Self) -> bool {
                (min..=max).contains(&self)
            }
        }
    )+};
}

whole_numbers!(u32, u64, usize);

impl Value for f64 {
    fn parse(text: &str) -> Result<Self, String> {
        let number: f64 = text.trim().parse().map_err(|_| "a number".to_owned())?;
        if number.is_finite() {
            Ok(number)
        } else {
            Err("a finite number".to_owned())
        }
    }

    fn show(&self) -> String {
        format!("{self:?}")
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

impl Value for bool {
    const SWITCH: bool = true;

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "true" | "on" | "yes" | "1" => Ok(true),
            "false" | "off" | "no" | "0" => Ok(false),
            _ => Err("true or false".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn show(&self) -> String {
        quoted(self)
    }
}

impl Value for PathBuf {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            Err("a path".to_owned())
        } else {
            Ok(PathBuf::from(text))
        }
    }

    fn show(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl Value for MaybePath {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(MaybePath((!text.is_empty()).then(|| PathBuf::from(text))))
    }

    fn show(&self) -> String {
        quoted(
            &self
                .0
                .as_ref()
                .map(|path| path.to_string_lossy())
                .unwrap_or_default(),
        )
    }
}

impl Value for SocketAddr {
    fn parse(text: &str) -> Result<Self, String> {
        text.trim()
            .parse()
            .map_err(|_| "an address and port such as 127.0.0.1:7411 or [::1]:7411".to_owned())
    }

    fn show(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Value for MaybeAddr {
    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" | "off" => Ok(MaybeAddr(None)),
            addr => SocketAddr::parse(addr)
                .map(|addr| MaybeAddr(Some(addr)))
                .map_err(|expected| format!("{expected}, or off")),
        }
    }

    fn show(&self) -> String {
        quoted(&self.0.map_or("off".to_owned(), |addr| addr.to_string()))
    }
}

impl Value for Secret {
    const SECRET: bool = true;

    fn parse(text: &str) -> Result<Self, String> {
        Ok(Secret((!text.is_empty()).then(|| text.to_owned())))
    }

    fn show(&self) -> String {
        if self.0.is_some() {
            "\"\" # set, redacted".to_owned()
        } else {
            "\"\"".to_owned()
        }
    }
}

impl Value for LogFormat {
    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "pretty" => Ok(LogFormat::Pretty),
            "json" => Ok(LogFormat::Json),
            _ => Err("pretty or json".to_owned()),
        }
    }

    fn show(&self) -> String {
        match self {
            LogFormat::Pretty => quoted("pretty"),
            LogFormat::Json => quoted("json"),
        }
    }
}

impl Value for MaybeDtype {
    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(MaybeDtype(None)),
            name => name
                .parse()
                .map(|dtype| MaybeDtype(Some(dtype)))
                .map_err(|_| "auto, f32, bf16, f16, q8 or stored".to_owned()),
        }
    }

    fn show(&self) -> String {
        quoted(self.0.map_or("auto", Dtype::as_str))
    }
}

impl Value for DeviceChoice {
    fn parse(text: &str) -> Result<Self, String> {
        text.trim()
            .parse()
            .map_err(|_| "auto, cpu, cuda or cuda:N".to_owned())
    }

    fn show(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Value for ByteSize {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || "a number of bytes such as 65536, 512KiB, 4MiB or 1GiB".to_owned();
        let (number, unit) = split_unit(text);
        let factor: u64 = match unit {
            "" | "B" => 1,
            "KiB" | "K" => 1 << 10,
            "MiB" | "M" => 1 << 20,
            "GiB" | "G" => 1 << 30,
            "TiB" | "T" => 1 << 40,
            _ => return Err(expected()),
        };
        let number: u64 = number.replace('_', "").parse().map_err(|_| expected())?;
        number
            .checked_mul(factor)
            .map(ByteSize)
            .ok_or_else(expected)
    }

    fn show(&self) -> String {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units
            .iter()
            .find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((shift, name)) => quoted(&format!("{}{name}", self.0 >> shift)),
            None => self.0.to_string(),
        }
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

impl Value for Duration {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || "a duration such as 10ms, 30s, 5min or 1h".to_owned();
        let (number, unit) = split_unit(text);
        let number: u64 = number.parse().map_err(|_| expected())?;
        let micros: u64 = match unit {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "min" | "m" => 60_000_000,
            "h" => 3_600_000_000,
            "" if number == 0 => 1,
            _ => return Err(expected()),
        };
        number
            .checked_mul(micros)
            .map(Duration::from_micros)
            .ok_or_else(expected)
    }

    fn show(&self) -> String {
        let micros = self.as_micros();
        let units = [
            (3_600_000_000, "h"),
            (60_000_000, "min"),
            (1_000_000, "s"),
            (1_000, "ms"),
            (1, "us"),
        ];
        let (factor, name) = units
            .iter()
            .find(|(factor, _)| micros > 0 && micros.is_multiple_of(*factor))
            .unwrap_or(&(1_000_000, "s"));
        quoted(&format!("{}{name}", micros / factor))
    }

    fn within(&self, min: &Self, max: &Self) -> bool {
        (min..=max).contains(&self)
    }
}

/// Digits (and underscores) in front, the unit behind.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '_')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_survive_printing() {
        for text in ["0", "1", "65537", "512KiB", "4MiB", "1GiB", "3TiB"] {
            let size = ByteSize::parse(text).unwrap();
            assert_eq!(
                ByteSize::parse(size.show().trim_matches('"')).unwrap(),
                size,
                "{text}"
            );
        }
        for text in ["0s", "15us", "10ms", "1500ms", "90s", "2min", "24h"] {
            let duration = Duration::parse(text).unwrap();
            assert_eq!(
                Duration::parse(duration.show().trim_matches('"')).unwrap(),
                duration,
                "{text}"
            );
        }
    }

    #[test]
    fn nonsense_says_what_was_expected() {
        for text in ["", "4 potatoes", "-1", "99999999999TiB", "1.5GiB"] {
            assert!(
                ByteSize::parse(text).unwrap_err().contains("4MiB"),
                "{text}"
            );
        }
        for text in ["", "10", "s", "-1s", "18446744073709551615h"] {
            assert!(
                Duration::parse(text).unwrap_err().contains("10ms"),
                "{text}"
            );
        }
        assert!(
            SocketAddr::parse("localhost:1")
                .unwrap_err()
                .contains("127.0.0.1:7411")
        );
        assert!(f64::parse("NaN").is_err());
    }
}
