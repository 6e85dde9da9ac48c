//! What a worker is told of one container: an annotation of the spec that it gets.
//!
//! Program arguments, environment, working directory and user are the spec's own.

use serde::{Deserialize, Serialize};

use crate::kind::Kind;

/// Annotation with a [`Job`] as JSON, written by the sandboxer over whatever an image or a pod says.
pub const ANNOTATION: &str = "io.kuasar.wasm.job";

/// What an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Code that our compiler has made of the module.
    Compiled,
    /// The module itself, to be interpreted.
    Module,
    /// A shared object of the image, which the engine's own compiler has made: native code.
    Shared,
}

/// What a program may spend before it is stopped; 0 for no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Units of the engine, about one for each WebAssembly instruction.
    pub fuel: u64,
    /// Milliseconds since Start.
    pub time: u64,
}

impl Budget {
    /// How compiled code has to be made so that it can be held to this: part of the compiler's
    /// arguments, and of the name of the code in the cache.
    pub fn variant(&self, interruptible: bool) -> &'static str {
        match (self.fuel > 0, self.time > 0 || interruptible) {
            (false, false) => "plain",
            (true, false) => "fuel",
            (false, true) => "epoch",
            (true, true) => "fuel+epoch",
        }
    }

    /// The same for a component that may be of WASI 0.3.
    pub fn variant_p3(&self, interruptible: bool) -> String {
        format!("{}+p3", self.variant(interruptible))
    }
}

/// What runs in a container, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Number of the descriptor of what is run.
    pub artifact: i32,
    /// What it is.
    pub form: Form,
    /// Where the module is in the image.
    pub path: String,
    /// SHA-256 of the module, in hexadecimal digits.
    pub digest: String,
    /// What it was compiled from.
    pub kind: Kind,
    /// Most bytes of one linear memory; 0 for no limit but the engine's.
    pub memory: u64,
    /// Port on which a component that answers requests is served.
    pub port: u16,
    /// Connections to it at the same time.
    pub connections: u32,
    /// What the program may spend.
    pub budget: Budget,
    /// How compiled code was made: [`Budget::variant`].
    pub variant: String,
    /// Most threads that it may have beside its first.
    pub threads: u32,
}

impl Job {
    /// One that runs compiled code, without a budget or threads.
    pub fn of(kind: Kind) -> Self {
        Self {
            artifact: 0,
            form: Form::Compiled,
            path: String::new(),
            digest: String::new(),
            kind,
            memory: 0,
            port: 0,
            connections: 0,
            budget: Budget::default(),
            variant: Budget::default().variant(false).to_owned(),
            threads: 0,
        }
    }
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
        let job = Job { artifact: 5, memory: 1 << 20, port: 80, ..Job::of(Kind::Component) };
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert!(Job::from_json("{}").unwrap_err().contains(ANNOTATION));
    }
}
