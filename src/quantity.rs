//! Sizes and lengths of time, as people write them in settings, variables and flags.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A number of bytes, written `512M`, `4G`, `1.5T` or as a plain number of bytes.
///
/// Units are binary, as in QEMU and libvirt tools: `K`, `M`, `G`, `T`, with an optional `iB` or `B`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(u64);

impl Size {
    /// A size of this many MiB.
    pub const fn mib(n: u64) -> Self {
        Size(n << 20)
    }

    /// A size of this many GiB.
    pub const fn gib(n: u64) -> Self {
        Size(n << 30)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size in MiB, rounded up.
    pub const fn to_mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }

    /// A size of this many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Size(bytes)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a size; write for example \"512M\" or \"4G\"");
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 6 || (shift == 0 && !fraction.is_empty()) {
            return Err(wrong());
        }
        let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?);
        let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
        let bytes = digits
            .checked_shl(shift)
            .filter(|b| b >> shift == digits)
            .ok_or_else(wrong)?
            / scale;
        u64::try_from(bytes)
            .ok()
            .filter(|b| *b < 1 << 60)
            .map(Size)
            .ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"4G\"")
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Size, E> {
                v.parse().map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Size, E> {
                u64::try_from(v)
                    .map(Size)
                    .map_err(|_| E::custom("a size cannot be negative"))
            }
        }
        d.deserialize_any(V)
    }
}

/// A length of time, written `90s`, `5m`, `1h30m`, `7 days`, or as a plain number of seconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span(pub Duration);

impl Span {
    /// A span of this many seconds.
    pub const fn secs(n: u64) -> Self {
        Span(Duration::from_secs(n))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs();
        match s {
            0 => write!(f, "{}ms", self.0.as_millis()),
            _ if s.is_multiple_of(3600) => write!(f, "{}h", s / 3600),
            _ if s.is_multiple_of(60) => write!(f, "{}m", s / 60),
            _ => write!(f, "{s}s"),
        }
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("\"{text}\" is not a length of time; write for example \"90s\", \"5m\" or \"1h30m\"");
        let mut total: u64 = 0;
        let mut rest = text.trim();
        if rest.is_empty() {
            return Err(wrong());
        }
        if rest.bytes().all(|b| b.is_ascii_digit()) {
            return rest.parse().map(Span::secs).map_err(|_| wrong());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
            let unit_end = rest[digits..]
                .find(|c: char| c.is_ascii_digit())
                .map_or(rest.len(), |n| digits + n);
            let factor = match rest[digits..unit_end].trim() {
                "s" | "sec" => 1,
                "m" | "min" => 60,
                "h" => 3600,
                "d" | "day" | "days" => 86400,
                _ => return Err(wrong()),
            };
            total = number
                .checked_mul(factor)
                .and_then(|n| total.checked_add(n))
                .ok_or_else(wrong)?;
            rest = rest[unit_end..].trim_start();
        }
        Ok(Span::secs(total))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Span;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time such as \"5m\"")
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Span, E> {
                v.parse().map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Span, E> {
                u64::try_from(v)
                    .map(Span::secs)
                    .map_err(|_| E::custom("a length of time cannot be negative"))
            }
        }
        d.deserialize_any(V)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("512", 512),
            ("512M", 512 << 20),
            ("4G", 4 << 30),
            ("4 GiB", 4 << 30),
            ("1.5G", 3 << 29),
            ("2t", 2 << 40),
            ("0", 0),
        ] {
            assert_eq!(text.parse::<Size>().map(Size::bytes), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1G",
            "4X",
            "1.2.3G",
            "99999999999999T",
            "4G;rm -rf /",
            "1.5",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size::gib(4).to_string(), "4G");
        assert_eq!(Size::mib(1536).to_string(), "1536M");
    }

    #[test]
    fn spans_read_as_people_write_them() {
        for (text, secs) in [
            ("90", 90),
            ("90s", 90),
            ("5m", 300),
            ("1h30m", 5400),
            ("1h 30m", 5400),
            ("2d", 172800),
            ("7 days", 604_800),
        ] {
            assert_eq!(text.parse::<Span>(), Ok(Span::secs(secs)), "{text}");
        }
        for text in ["", "m", "5 parsecs", "-3s", "99999999999999999999s", "5m3"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
