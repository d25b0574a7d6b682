//! Keys that are pressed together on a machine's keyboard, by their names.

use std::str::FromStr;

/// The most keys that libvirt presses at once (`VIR_DOMAIN_SEND_KEY_MAX_KEYS`).
const MOST: usize = 16;

/// Names of keys and Linux's numbers of them (`linux/input-event-codes.h`). Letters, digits and function keys are in [`number`].
const NAMED: [(&str, u32); 48] = [
    ("esc", 1),
    ("minus", 12),
    ("equal", 13),
    ("backspace", 14),
    ("tab", 15),
    ("leftbrace", 26),
    ("rightbrace", 27),
    ("enter", 28),
    ("ret", 28),
    ("ctrl", 29),
    ("semicolon", 39),
    ("apostrophe", 40),
    ("grave", 41),
    ("shift", 42),
    ("backslash", 43),
    ("comma", 51),
    ("dot", 52),
    ("slash", 53),
    ("rightshift", 54),
    ("alt", 56),
    ("space", 57),
    ("capslock", 58),
    ("numlock", 69),
    ("scrolllock", 70),
    ("rightctrl", 97),
    ("print", 99),
    ("sysrq", 99),
    ("rightalt", 100),
    ("altgr", 100),
    ("home", 102),
    ("up", 103),
    ("pageup", 104),
    ("pgup", 104),
    ("left", 105),
    ("right", 106),
    ("end", 107),
    ("down", 108),
    ("pagedown", 109),
    ("pgdn", 109),
    ("insert", 110),
    ("ins", 110),
    ("delete", 111),
    ("del", 111),
    ("pause", 119),
    ("super", 125),
    ("meta", 125),
    ("rightsuper", 126),
    ("menu", 127),
];

/// Letters and digits by rows of the keyboard, each with the number of its first key; the others follow one by one.
const ROWS: [(&str, u32); 4] = [
    ("1234567890", 2),
    ("qwertyuiop", 16),
    ("asdfghjkl", 30),
    ("zxcvbnm", 44),
];

/// Keys that are pressed together, as `ctrl-alt-del` or `a`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys(Vec<u32>);

/// Why a text names no keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A part of it is no key's name.
    #[error("{0:?} is no key; keys are named as in ctrl-alt-del, alt-f2, shift-a or enter")]
    Unknown(String),
    /// More than can be pressed at once.
    #[error("at most {MOST} keys can be pressed together")]
    TooMany,
}

impl Keys {
    /// Linux's numbers of the keys, in the order in which they go down.
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }
}

impl FromStr for Keys {
    type Err = Error;

    /// Names are joined by `-` or `+`, in either case.
    fn from_str(text: &str) -> Result<Self, Error> {
        let numbers = text
            .split(['-', '+'])
            .map(|name| number(&name.to_ascii_lowercase()).ok_or_else(|| Error::Unknown(name.to_owned())))
            .collect::<Result<Vec<_>, _>>()?;
        if numbers.len() > MOST {
            return Err(Error::TooMany);
        }
        Ok(Keys(numbers))
    }
}

fn number(name: &str) -> Option<u32> {
    if let Some((_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    if let Some(function) = name.strip_prefix('f')
        && !function.is_empty()
    {
        return match function.parse().ok()? {
            // Two keys were added behind the number block.
            number @ 1..=10 => Some(58 + number),
            number @ 11..=12 => Some(76 + number),
            _ => None,
        };
    }
    ROWS.iter().find_map(|(row, first)| {
        (name.len() == 1)
            .then(|| row.find(name))
            .flatten()
            .and_then(|at| Some(first + u32::try_from(at).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(text: &str) -> Vec<u32> {
        text.parse::<Keys>().unwrap().numbers().to_vec()
    }

    #[test]
    fn keys_are_named_alone_and_together() {
        assert_eq!(numbers("ctrl-alt-del"), [29, 56, 111]);
        assert_eq!(numbers("Ctrl+Alt+F2"), [29, 56, 60]);
        assert_eq!(numbers("a"), [30]);
        assert_eq!(numbers("shift-1"), [42, 2]);
        assert_eq!(numbers("0"), [11]);
        assert_eq!(numbers("f"), [33]);
        assert_eq!(numbers("m"), [50]);
        assert_eq!(numbers("f10-f11-f12"), [68, 87, 88]);
        assert_eq!(numbers("minus"), [12]);
    }

    #[test]
    fn what_is_no_key_is_named() {
        for text in [
            "",
            "-",
            "ctrl-",
            "ctrl-alt-dell",
            "f0",
            "f13",
            "qw",
            "ä",
            "f-1-",
            "ctrl alt",
        ] {
            let error = text.parse::<Keys>().unwrap_err();
            assert!(matches!(error, Error::Unknown(_)), "{text}: {error}");
        }
        assert_eq!(
            "a-".repeat(16).as_str().parse::<Keys>(),
            Err(Error::Unknown(String::new()))
        );
        assert_eq!(vec!["a"; 17].join("-").parse::<Keys>(), Err(Error::TooMany));
        assert_eq!(numbers(&vec!["a"; 16].join("-")).len(), 16);
    }
}
