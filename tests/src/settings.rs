//! The configuration of the daemon under test, changed for one test.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::{bed, daemon_pid, kind, wait_for};

/// The daemon's configuration; as it was when dropped.
pub struct Settings {
    /// The file.
    pub path: PathBuf,
    /// What is in it without the test.
    pub text: String,
}

impl Settings {
    /// Of the daemon under test.
    pub fn open() -> Self {
        let path = bed().join(format!("etc/kuasar-{}.toml", kind()));
        let text = std::fs::read_to_string(&path).unwrap();
        Self { path, text }
    }

    /// Puts lines in front, tells the daemon, and waits until its log has `word`; answers what it
    /// has logged since.
    pub fn reload(&self, lines: &str, word: &str) -> String {
        self.reload_as(&format!("{lines}\n{}", self.text), word)
    }

    /// The same with this text in place of the file's.
    pub fn reload_as(&self, text: &str, word: &str) -> String {
        let from = log().len();
        std::fs::write(&self.path, text).unwrap();
        hang_up();
        wait_for(word, Duration::from_secs(10), || log()[from..].contains(word));
        log()[from..].to_owned()
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.text);
        hang_up();
    }
}

/// Has the daemon read its configuration again.
pub fn hang_up() {
    Command::new("kill").args(["-HUP", &daemon_pid().to_string()]).status().unwrap();
}

/// What the daemon has logged.
pub fn log() -> String {
    let bytes = std::fs::read(bed().join(format!("run/kuasar-{}.log", kind()))).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}
