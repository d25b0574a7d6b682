//! `CANNERY_CPUS`, `CANNERY_MEMORY`, `CANNERY_DISK`, `CANNERY_HOLD`: what a job's author wants, and what the operator grants.

use std::time::Duration;

use super::{Environment, Error};
use crate::quantity::{Size, Span};

/// What the job's variables ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wants {
    /// `CANNERY_CPUS`
    pub cpus: Option<u32>,
    /// `CANNERY_MEMORY`
    pub memory: Option<Size>,
    /// `CANNERY_DISK`
    pub disk: Option<Size>,
    /// `CANNERY_HOLD`
    pub hold: Option<Span>,
}

/// What a job gets unless it asks, and the most that it may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// CPUs: usual and most.
    pub cpus: (u32, u32),
    /// Memory: usual and most.
    pub memory: (Size, Size),
    /// Disk: the image's own size or the operator's least, and most.
    pub disk: (Size, Size),
}

/// What the job gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: Size,
    /// Disk.
    pub disk: Size,
}

const CPUS: &str = "CANNERY_CPUS";
const MEMORY: &str = "CANNERY_MEMORY";
const DISK: &str = "CANNERY_DISK";
const HOLD: &str = "CANNERY_HOLD";
/// The least memory that holds a kernel and an sshd.
const LEAST_MEMORY: Size = Size::mib(64);

impl Wants {
    /// Reads the variables.
    pub fn read(environment: &Environment) -> Result<Wants, Error> {
        let cpus = environment
            .variable(CPUS)
            .map(|value| match value.trim().parse() {
                Ok(n) if n > 0 => Ok(n),
                _ => Err(wrong(
                    CPUS,
                    value,
                    "it must be a whole number of at least 1".to_owned(),
                )),
            })
            .transpose()?;
        let size = |name: &'static str| {
            let parse = |value: &str| match value.trim().parse::<Size>() {
                Ok(size) if size.bytes() > 0 => Ok(size),
                _ => Err(wrong(
                    name,
                    value,
                    "it must be a size such as \"4G\" or \"512M\"".to_owned(),
                )),
            };
            environment.variable(name).map(parse).transpose()
        };
        let hold = environment
            .variable(HOLD)
            .map(|value| match value.trim().parse() {
                Ok(span) => Ok(span),
                Err(_) => Err(wrong(
                    HOLD,
                    value,
                    "it must be a length of time such as \"30m\", or 0".to_owned(),
                )),
            })
            .transpose()?;
        Ok(Wants {
            cpus,
            memory: size(MEMORY)?,
            disk: size(DISK)?,
            hold,
        })
    }

    /// For how long the machine stays after the job's script failed: `usual` unless the job asks, and never longer than `most`.
    pub fn hold_within(self, usual: Duration, most: Duration) -> Result<Duration, Error> {
        match self.hold {
            Some(Span(asked)) if asked > most => {
                let why = if most.is_zero() {
                    "the operator of this runner lets no job choose it: hold.max is not set".to_owned()
                } else {
                    format!("the operator of this runner allows at most {}", Span(most))
                };
                Err(wrong(HOLD, &Span(asked).to_string(), why))
            }
            Some(Span(asked)) => Ok(asked),
            None => Ok(usual),
        }
    }

    /// What the job gets within the operator's bounds.
    pub fn within(self, bounds: &Bounds) -> Result<Granted, Error> {
        let most = |name, value: String, most: String| {
            wrong(
                name,
                &value,
                format!("the operator of this runner allows at most {most}"),
            )
        };
        if let Some(cpus) = self.cpus.filter(|c| *c > bounds.cpus.1) {
            return Err(most(CPUS, cpus.to_string(), bounds.cpus.1.to_string()));
        }
        for (name, value, limit) in [
            (MEMORY, self.memory, bounds.memory.1),
            (DISK, self.disk, bounds.disk.1),
        ] {
            if let Some(value) = value.filter(|v| *v > limit) {
                if limit.bytes() == 0 {
                    let why = "the operator of this runner lets no job choose it: limits.disk is not set";
                    return Err(wrong(name, &value.to_string(), why.to_owned()));
                }
                return Err(most(name, value.to_string(), limit.to_string()));
            }
        }
        if let Some(memory) = self.memory.filter(|m| *m < LEAST_MEMORY) {
            return Err(wrong(
                MEMORY,
                &memory.to_string(),
                format!("a machine needs at least {}", LEAST_MEMORY),
            ));
        }
        Ok(Granted {
            cpus: self.cpus.unwrap_or(bounds.cpus.0),
            memory: self.memory.unwrap_or(bounds.memory.0),
            // A disk cannot be smaller than what is on it.
            disk: self.disk.unwrap_or(Size::from_bytes(0)).max(bounds.disk.0),
        })
    }
}

/// Far longer than any number or size. A longer text is not shown in part: GitLab masks secrets by their whole text only, and
/// the author may have named a wrong variable.
const LONGEST_VALUE: usize = 40;

fn wrong(variable: &'static str, value: &str, message: String) -> Error {
    let value = if value.chars().count() > LONGEST_VALUE || value.contains(char::is_control) {
        "…".to_owned()
    } else {
        value.to_owned()
    };
    Error::Variable {
        variable,
        value,
        message,
    }
}
