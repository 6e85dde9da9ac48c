//! What a worker is told of one container: an annotation of the spec that it gets.
//!
//! Program arguments, environment, working directory and user are the spec's own.

use serde::{Deserialize, Serialize};

use crate::kind::Kind;

/// Annotation with a [`Job`] as JSON, written by the sandboxer over whatever an image or a pod says.
pub const ANNOTATION: &str = "io.kuasar.wasm.job";

/// What runs in a container, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Number of the descriptor of the compiled code.
    pub artifact: i32,
    /// What it was compiled from.
    pub kind: Kind,
    /// Most bytes of one linear memory; 0 for no limit but the engine's.
    pub memory: u64,
    /// Port on which a component that answers requests is served.
    pub port: u16,
    /// Connections to it at the same time.
    pub connections: u32,
}

impl Job {
    /// As it stands in the annotation.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the annotation.
    ///
    /// # Errors
    /// When it is none that this version writes.
    pub fn from_json(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| format!("{ANNOTATION}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_as_it_was_written() {
        let job =
            Job { artifact: 5, kind: Kind::Component, memory: 1 << 20, port: 80, connections: 9 };
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert!(Job::from_json("{}").unwrap_err().contains(ANNOTATION));
    }
}
