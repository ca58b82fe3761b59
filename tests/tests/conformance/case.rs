//! What is compared: settings (a configuration and a state) and frames, from a seed.

use std::fmt;

use sluice_policy::generate::{Rng, Scenario, frame, scenario};

/// A configuration, with the state in which each of its cases begins.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Counts from 0.
    pub(crate) number: u64,
    pub(crate) scenario: Scenario,
}

/// A frame that comes from a port.
#[derive(Debug)]
pub(crate) struct Case {
    /// Name of the port.
    pub(crate) ingress: String,
    pub(crate) frame: Vec<u8>,
}

impl Case {
    /// Whether the destination is a single station.
    pub(crate) fn is_unicast(&self) -> bool {
        self.frame.first().is_some_and(|byte| byte & 1 == 0)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from {}: {} bytes ", self.ingress, self.frame.len())?;
        for byte in self.frame.iter().take(300) {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// The cases of a seed.
pub(crate) struct Cases {
    rng: Rng,
    settings: u64,
}

impl Cases {
    pub(crate) fn new(seed: u64) -> Cases {
        Cases { rng: Rng::new(seed), settings: 0 }
    }

    pub(crate) fn next_setting(&mut self) -> Setting {
        let number = self.settings;
        self.settings += 1;
        Setting { number, scenario: scenario(&mut self.rng) }
    }

    pub(crate) fn next_case(&mut self, setting: &Setting) -> Case {
        let (ingress, frame) = frame(&mut self.rng, &setting.scenario);
        Case { ingress, frame }
    }
}
