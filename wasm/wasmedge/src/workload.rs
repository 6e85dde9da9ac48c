//! What runs in a container: a module, as its code or as it is.
//!
//! As with Wasmtime everything that can be found wrong is found by [`Wasm::prepare`], in the
//! container, so that it is the answer to Create; see [`module`] for what that takes.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use kuasar_oci::builtin::workload::{Container, Workload};
use wasm_common::job::{Form, Job};
use wasm_common::kind::Kind;
use wasm_common::wire::Hello;
use wasm_process::container::{self, SPENT, TRAPPED, close_others, exit, on_signals, say};
use wasm_process::zygote;

use crate::library::{COST_LIMIT, Failure, Library, Machine, Settings, hello_of};
use crate::module;

/// Bytes of a page of linear memory.
const PAGE: u64 = 65536;

/// The library, loaded.
pub struct Warm {
    library: &'static Library,
    hello: Hello,
}

impl Warm {
    /// Loads the library, and the plugins of a directory unless its name is empty.
    ///
    /// # Errors
    /// When there is no library; the text says what to install.
    pub fn new(library: &str, plugins: &str) -> Result<Self, String> {
        zygote::name("wasmedge-zygote");
        // Never unloaded: it is in every container until its end.
        let library: &'static Library = Box::leak(Box::new(Library::load(library)?));
        if !plugins.is_empty() {
            library.load_plugins(plugins)?;
        }
        // Touches what the first container would touch.
        drop(Machine::new(library, Settings::default())?);
        Ok(Self { library, hello: hello_of(library) })
    }
}

impl zygote::Engine for Warm {
    fn hello(&self) -> Hello {
        self.hello.clone()
    }

    fn workload(&'static self) -> Box<dyn Workload> {
        Box::new(Wasm { library: self.library, ready: None })
    }
}

/// A container's program.
struct Wasm {
    library: &'static Library,
    ready: Option<Ready>,
}

struct Ready {
    machine: Machine,
    time: u64,
}

impl Workload for Wasm {
    fn prepare(&mut self, container: &Container<'_>) -> Result<(), String> {
        let job = container::job(container)?;
        let mut keep: Vec<i32> = container.kept.iter().map(AsRawFd::as_raw_fd).collect();
        keep.push(job.artifact);
        close_others(keep);
        if job.artifact < 3 {
            return Err(format!("descriptor {} is no artifact", job.artifact));
        }
        // SAFETY: the sandboxer has passed it on under this number, for nobody else.
        let artifact = unsafe { File::from_raw_fd(job.artifact) };
        on_signals(None);
        let program = container.args.first().and_then(|path| path.rsplit('/').next());
        zygote::name(program.unwrap_or("wasm"));
        let machine = self.load(&job, &artifact)?;
        let (arguments, environment) = (texts(container.args), texts(container.env));
        let mut directories = vec!["/:/".to_owned()];
        // A name with a colon cannot be said.
        if container.cwd != "/" && !container.cwd.contains(':') {
            // Programs of wasi-libc look names without a slash up in a directory named so.
            directories.push(format!(".:{}", container.cwd));
        }
        machine.world(&arguments, &environment, &texts(&directories));
        self.ready = Some(Ready { machine, time: job.budget.time });
        Ok(())
    }

    fn run(self: Box<Self>) -> String {
        let Some(ready) = self.ready else { return "not prepared".into() };
        if ready.time > 0 {
            container::end_after(Duration::from_millis(ready.time));
        }
        match ready.machine.run() {
            // As exit(2) does it.
            Ok(code) => exit(i32::try_from(code & 0xff).unwrap_or(TRAPPED)),
            Err(failure) if failure.code == COST_LIMIT => {
                say(&format!("its fuel is used up: {}", failure.message));
                exit(SPENT)
            }
            Err(failure) => {
                say(&failure.message);
                exit(TRAPPED)
            }
        }
    }
}

impl Wasm {
    fn load(&self, job: &Job, artifact: &File) -> Result<Machine, String> {
        let theirs = |failure: Failure| format!("exec: {}", failure.message);
        if job.kind == Kind::Component {
            return Err(format!("exec: {}", module::NO_COMPONENTS));
        }
        let machine = Machine::new(
            self.library,
            Settings {
                pages: job.memory / PAGE,
                fuel: job.budget.fuel,
                compiled: job.form != Form::Module,
            },
        )?;
        if job.form == Form::Shared {
            let path = CString::new(&*job.path).map_err(|_| "the path has a NUL")?;
            machine.load_file(&path).map_err(theirs)?;
            return Ok(machine);
        }
        let bytes = mapped(artifact).map_err(|error| format!("map the module: {error}"))?;
        let needs = module::needs(bytes).map_err(|error| format!("exec: {error}"))?;
        let wanted = needs.pages.saturating_mul(PAGE);
        if job.memory > 0 && wanted > job.memory {
            return Err(format!(
                "exec: a linear memory of {wanted} bytes is asked for, and the container has a \
                 limit of {}: permission denied",
                job.memory
            ));
        }
        if !needs.starts {
            return Err(
                "exec: the module has no function _start: it is a library, not a program".into()
            );
        }
        for (module, name) in &needs.functions {
            if !machine.offers(module, name) {
                return Err(format!(
                    "exec: unknown import: `{module:.100}::{name:.100}` has not been defined"
                ));
            }
        }
        machine.load(bytes).map_err(theirs)?;
        Ok(machine)
    }
}

/// As C has them; nothing that the kernel has passed on has a NUL.
fn texts(all: &[String]) -> Vec<CString> {
    all.iter().filter_map(|text| CString::new(text.as_str()).ok()).collect()
}

/// A file's content, mapped until the process ends.
fn mapped(file: &File) -> std::io::Result<&'static [u8]> {
    let length = usize::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?;
    if length == 0 {
        return Ok(&[]);
    }
    let (read, private) = (libc::PROT_READ, libc::MAP_PRIVATE);
    // SAFETY: a new private mapping of a file.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), length, read, private, file.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the mapping has this length and is never removed. The sandboxer's file is one that
    // nobody changes; were a module of an image changed, its own container alone would suffer.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<u8>(), length) })
}
