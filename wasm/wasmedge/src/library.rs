//! The part of WasmEdge's C API that is used here, from a library that is loaded at run time.
//!
//! Names, structures and numbers are those of `wasmedge.h` of 0.14 and of the headers of 0.17 (the
//! versions that Debian has), which have the soname `libwasmedge.so.0` both.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{Hash, Hasher};

use wasm_common::wire::{Hello, PROTOCOL};

/// `WasmEdge_String` and `WasmEdge_Bytes`: a length, and where.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slice {
    length: u32,
    start: *const u8,
}

impl Slice {
    /// Of these bytes, as long as they live.
    ///
    /// # Errors
    /// When they are too many.
    pub fn of(bytes: &[u8]) -> Result<Self, String> {
        let length = u32::try_from(bytes.len()).map_err(|_| "the module is too large")?;
        Ok(Self { length, start: bytes.as_ptr() })
    }
}

/// `WasmEdge_Result`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    code: u32,
}

/// An object of the library's.
pub type Object = *mut c_void;

/// `WasmEdge_HostRegistration_Wasi`.
pub const WASI: c_int = 0;
/// `WasmEdge_CompilerOutputFormat_Wasm`: a module with compiled code in a section of its own.
const FORMAT_WASM: c_int = 1;
/// `WasmEdge_RunMode_AOT`, of 0.17.
const RUN_MODE_AOT: c_int = 2;
/// `WasmEdge_ErrCode_CostLimitExceeded`.
pub const COST_LIMIT: u32 = 0x03;

/// Declares functions of the library, and how they are found.
macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $name:literal ($($argument:ty),*) $(-> $answer:ty)?;)*) => {
        /// Functions of the library, by their names without the prefix `WasmEdge_`.
        struct Functions {
            $($(#[$doc])* $field: unsafe extern "C" fn($($argument),*) $(-> $answer)?,)*
        }

        impl Functions {
            fn find(library: &libloading::Library) -> Result<Self, String> {
                // SAFETY: the signatures are those of the headers.
                unsafe {
                    Ok(Self {
                        $($field: *library.get(concat!("WasmEdge_", $name)).map_err(|error| {
                            format!("{error}: this version of libwasmedge is not known")
                        })?,)*
                    })
                }
            }
        }
    };
}

functions! {
    version = "VersionGet"() -> *const c_char;
    log_off = "LogOff"();
    result_ok = "ResultOK"(Outcome) -> bool;
    result_code = "ResultGetCode"(Outcome) -> u32;
    result_message = "ResultGetMessage"(Outcome) -> *const c_char;
    plugins = "PluginLoadFromPath"(*const c_char);
    configure = "ConfigureCreate"() -> Object;
    configure_delete = "ConfigureDelete"(Object);
    configure_host = "ConfigureAddHostRegistration"(Object, c_int);
    // 32 bits in 0.14, which takes the lower half of the register.
    configure_pages = "ConfigureSetMaxMemoryPage"(Object, u64);
    configure_format = "ConfigureCompilerSetOutputFormat"(Object, c_int);
    configure_cost = "ConfigureStatisticsSetCostMeasuring"(Object, bool);
    configure_count = "ConfigureStatisticsSetInstructionCounting"(Object, bool);
    compiler = "CompilerCreate"(Object) -> Object;
    compile = "CompilerCompile"(Object, *const c_char, *const c_char) -> Outcome;
    vm = "VMCreate"(Object, Object) -> Object;
    vm_delete = "VMDelete"(Object);
    vm_load_bytes = "VMLoadWasmFromBytes"(Object, Slice) -> Outcome;
    vm_load_file = "VMLoadWasmFromFile"(Object, *const c_char) -> Outcome;
    vm_validate = "VMValidate"(Object) -> Outcome;
    vm_instantiate = "VMInstantiate"(Object) -> Outcome;
    vm_execute = "VMExecute"(Object, Slice, *const c_void, u32, *mut c_void, u32) -> Outcome;
    vm_import = "VMGetImportModuleContext"(Object, c_int) -> Object;
    vm_registered = "VMGetRegisteredModule"(Object, Slice) -> Object;
    vm_statistics = "VMGetStatisticsContext"(Object) -> Object;
    cost_limit = "StatisticsSetCostLimit"(Object, u64);
    find_function = "ModuleInstanceFindFunction"(Object, Slice) -> Object;
    wasi = "ModuleInstanceInitWASI"(
        Object, *const *const c_char, u32, *const *const c_char, u32, *const *const c_char, u32
    );
    wasi_exit = "ModuleInstanceWASIGetExitCode"(Object) -> u32;
}

/// libwasmedge.
pub struct Library {
    functions: Functions,
    /// `ConfigureSetRunMode`: without it compiled code is not run by 0.17.
    run_mode: Option<unsafe extern "C" fn(Object, c_int)>,
    /// Keeps it loaded, as long as its functions can be called.
    _loaded: libloading::Library,
}

/// Why the library has not done what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its number.
    pub code: u32,
    /// Its words.
    pub message: String,
}

impl Library {
    /// Loads the library; `name` is a soname or a path.
    ///
    /// # Errors
    /// When it cannot be loaded; the text says what to install.
    pub fn load(name: &str) -> Result<Self, String> {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        // SAFETY: what loading it runs are initialisers of the library that the operator has named.
        // Now, since nothing can be found later, in a container; its plugins look its names up.
        let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
        let library = library.map_err(|error| {
            // The loader's own words are its cause.
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let reason = cause.unwrap_or_else(|| error.to_string());
            format!(
                "WasmEdge cannot be loaded ({reason}): install libwasmedge0 (the package's name in \
                 Debian and Ubuntu), or set wasmedge.library"
            )
        })?;
        let library = libloading::Library::from(library);
        let functions = Functions::find(&library)?;
        // SAFETY: the signature is the header's.
        let run_mode = unsafe { library.get(c"WasmEdge_ConfigureSetRunMode").ok().map(|f| *f) };
        // It writes to standard output, which is the container's.
        // SAFETY: no arguments.
        unsafe { (functions.log_off)() };
        Ok(Self { functions, run_mode, _loaded: library })
    }

    /// Its version.
    pub fn version(&self) -> String {
        // SAFETY: a string that is never freed.
        let text = unsafe { CStr::from_ptr((self.functions.version)()) };
        text.to_string_lossy().into_owned()
    }

    /// Loads all plugins of a directory.
    ///
    /// # Errors
    /// When the path is none.
    pub fn load_plugins(&self, dir: &str) -> Result<(), String> {
        let dir = CString::new(dir).map_err(|_| "wasmedge.plugins: a path without NUL")?;
        // SAFETY: a valid string.
        unsafe { (self.functions.plugins)(dir.as_ptr()) };
        Ok(())
    }

    fn check(&self, outcome: Outcome) -> Result<(), Failure> {
        // SAFETY: plain values; the message is never freed.
        unsafe {
            if (self.functions.result_ok)(outcome) {
                return Ok(());
            }
            let message = CStr::from_ptr((self.functions.result_message)(outcome));
            let code = (self.functions.result_code)(outcome);
            Err(Failure { code, message: message.to_string_lossy().into_owned() })
        }
    }

    /// Compiles the file `from` into the file `to`.
    ///
    /// # Errors
    /// The library's.
    pub fn compile(&self, from: &CStr, to: &CStr, counts: bool) -> Result<(), Failure> {
        let functions = &self.functions;
        // SAFETY: objects of the library, in the order that its documentation has. They live as
        // long as this process, which is about to end.
        let outcome = unsafe {
            let configure = (functions.configure)();
            (functions.configure_format)(configure, FORMAT_WASM);
            (functions.configure_cost)(configure, counts);
            (functions.configure_count)(configure, counts);
            let compiler = (functions.compiler)(configure);
            (functions.compile)(compiler, from.as_ptr(), to.as_ptr())
        };
        self.check(outcome)
    }
}

/// What a machine of the library is made with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings {
    /// Most pages of one linear memory; 0 for no bound.
    pub pages: u64,
    /// Fuel, which the library calls cost; 0 for no bound.
    pub fuel: u64,
    /// Runs compiled code where there is any.
    pub compiled: bool,
}

/// A machine of the library's (`WasmEdge_VMContext`) with WASI.
pub struct Machine {
    library: &'static Library,
    vm: Object,
}

impl Machine {
    /// A new one.
    ///
    /// # Errors
    /// When the library makes none.
    pub fn new(library: &'static Library, settings: Settings) -> Result<Self, String> {
        let functions = &library.functions;
        // SAFETY: objects of the library, in the order that its documentation has; the machine
        // copies its configuration.
        let vm = unsafe {
            let configure = (functions.configure)();
            (functions.configure_host)(configure, WASI);
            if settings.pages > 0 {
                (functions.configure_pages)(configure, settings.pages.min(65536));
            }
            if settings.fuel > 0 {
                (functions.configure_cost)(configure, true);
                (functions.configure_count)(configure, true);
            }
            if let (true, Some(run_mode)) = (settings.compiled, library.run_mode) {
                run_mode(configure, RUN_MODE_AOT);
            }
            let vm = (functions.vm)(configure, std::ptr::null_mut());
            (functions.configure_delete)(configure);
            vm
        };
        if vm.is_null() {
            return Err("WasmEdge makes no machine".into());
        }
        if settings.fuel > 0 {
            // SAFETY: the machine's own object.
            unsafe { (functions.cost_limit)((functions.vm_statistics)(vm), settings.fuel) };
        }
        Ok(Self { library, vm })
    }

    fn wasi_module(&self) -> Object {
        // SAFETY: the machine lives.
        unsafe { (self.library.functions.vm_import)(self.vm, WASI) }
    }

    /// Whether there is such a function for modules to import.
    pub fn offers(&self, module: &str, name: &str) -> bool {
        let (Ok(module), Ok(name)) = (Slice::of(module.as_bytes()), Slice::of(name.as_bytes()))
        else {
            return false;
        };
        // SAFETY: the machine lives, and so do the texts.
        unsafe {
            let found = (self.library.functions.vm_registered)(self.vm, module);
            !found.is_null() && !(self.library.functions.find_function)(found, name).is_null()
        }
    }

    /// Loads and validates a module, with the code that was compiled of it where it has some.
    ///
    /// # Errors
    /// The library's.
    pub fn load(&self, bytes: &'static [u8]) -> Result<(), Failure> {
        let slice = Slice::of(bytes).map_err(|message| Failure { code: 0, message })?;
        // SAFETY: the machine lives, and so do the bytes.
        self.library.check(unsafe { (self.library.functions.vm_load_bytes)(self.vm, slice) })?;
        self.validate()
    }

    /// The same for a file.
    ///
    /// # Errors
    /// The library's.
    pub fn load_file(&self, path: &CStr) -> Result<(), Failure> {
        let load = self.library.functions.vm_load_file;
        // SAFETY: the machine lives; a valid string.
        self.library.check(unsafe { load(self.vm, path.as_ptr()) })?;
        self.validate()
    }

    fn validate(&self) -> Result<(), Failure> {
        // SAFETY: the machine lives.
        self.library.check(unsafe { (self.library.functions.vm_validate)(self.vm) })
    }

    /// Gives the program its arguments, its environment, and its directories (`guest:host`).
    pub fn world(&self, arguments: &[CString], environment: &[CString], directories: &[CString]) {
        let pointers = |all: &[CString]| all.iter().map(|one| one.as_ptr()).collect::<Vec<_>>();
        let count = |all: &[CString]| u32::try_from(all.len()).unwrap_or(u32::MAX);
        let (a, e) = (pointers(arguments), pointers(environment));
        let d = pointers(directories);
        // SAFETY: lists of valid strings of these lengths, which the library copies.
        unsafe {
            (self.library.functions.wasi)(
                self.wasi_module(),
                a.as_ptr(),
                count(arguments),
                e.as_ptr(),
                count(environment),
                d.as_ptr(),
                count(directories),
            );
        }
    }

    /// Instantiates the module and calls `_start`; answers its exit code.
    ///
    /// # Errors
    /// A trap, or what cannot be instantiated.
    pub fn run(&self) -> Result<u32, Failure> {
        let functions = &self.library.functions;
        let start = Slice::of(b"_start").map_err(|message| Failure { code: 0, message })?;
        let (none, nothing) = (std::ptr::null(), std::ptr::null_mut());
        // SAFETY: the machine lives; no arguments and no answers.
        unsafe {
            self.library.check((functions.vm_instantiate)(self.vm))?;
            self.library.check((functions.vm_execute)(self.vm, start, none, 0, nothing, 0))?;
            Ok((functions.wasi_exit)(self.wasi_module()))
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: it is not used any more.
        unsafe { (self.library.functions.vm_delete)(self.vm) }
    }
}

/// What the library says of itself. Compiled code depends on its version, and on the processor:
/// the compiler uses whatever this one has.
pub fn hello_of(library: &Library) -> Hello {
    // Keys of std's default hasher are fixed; the value names files of a cache and nothing else.
    let mut hasher = std::hash::DefaultHasher::new();
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags =
        processor.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    flags.hash(&mut hasher);
    Hello {
        protocol: PROTOCOL,
        engine: "wasmedge".into(),
        version: library.version(),
        settings: format!("{:016x}", hasher.finish()),
    }
}
