//! NCCL behind a safe face: the library found at run time, nonblocking communicators, collectives
//! in place on tensors.
//!
//! Nothing here waits: a call starts work, [`Comm::state`] says how far it is. Deadlines are the
//! caller's, who can end everything with [`Comm::abort`].

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::Library;
use tch::{Kind, Tensor};

use super::gloo::Reduction;
use super::stream::Stream;

/// NVIDIA's wheel has the library under no other name, and so has the process once libtorch's CUDA
/// half is loaded.
pub const LIBRARY: &str = "libnccl.so.2";

/// `ncclConfig_t::magic`, by which the library knows an initialised configuration.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// The version of the header that [`ncclConfig_t`] is bound to, 2.28.0.
const CONFIG_VERSION: c_uint = 22800;
/// The value of options that are left to the library.
const UNDEFINED: c_int = c_int::MIN;

const SUCCESS: c_uint = 0;
const IN_PROGRESS: c_uint = 7;

/// Results are numbers, not an enum: a newer library may return ones that this header lacks.
type Status = c_uint;
type Stream_ = *mut c_void;
type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    ncclComm_t,
    Stream_,
) -> Status;

/// The library's functions that are used here.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Status,
    init: unsafe extern "C" fn(
        *mut ncclComm_t,
        c_int,
        ncclUniqueId,
        c_int,
        *mut ncclConfig_t,
    ) -> Status,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut Status) -> Status,
    abort: unsafe extern "C" fn(ncclComm_t) -> Status,
    finalize: unsafe extern "C" fn(ncclComm_t) -> Status,
    destroy: unsafe extern "C" fn(ncclComm_t) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        ncclComm_t,
        Stream_,
    ) -> Status,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        ncclComm_t,
        Stream_,
    ) -> Status,
}

/// The library, loaded.
pub struct Nccl {
    functions: Functions,
    /// Never unloaded: threads of NCCL's own run its code until the process ends.
    _library: ManuallyDrop<Library>,
}

/// What the ranks of a new communicator agree on: made by one, handed to the others.
pub type UniqueId = [u8; UNIQUE_ID_BYTES];

/// Bytes of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// How far a communicator's work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Everything that was started is queued on its stream.
    Queued,
    /// The library is still at it.
    InProgress,
}

/// One rank's end of a communicator. Dropping it without [`Comm::abort`] or [`Comm::leave`] leaks
/// it: neither may be called at a moment of the compiler's choosing.
#[derive(Debug)]
pub struct Comm {
    nccl: Arc<Nccl>,
    raw: Option<ncclComm_t>,
}

// SAFETY: NCCL's communicators may be used from any thread, by one at a time.
unsafe impl Send for Comm {}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Nccl")
    }
}

impl Nccl {
    /// Loads the library under `name`, a path or a name for the dynamic linker.
    ///
    /// # Errors
    /// The dynamic linker's message, or what the library lacks.
    pub fn load(name: impl AsRef<OsStr>) -> Result<Arc<Self>, String> {
        // SAFETY: NCCL's constructors only register it.
        let library = unsafe { Library::new(name.as_ref()) }.map_err(|error| linker(&error))?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field's type is the function's, as nccl.h of 2.28 declares it.
                *unsafe { library.get($name) }.map_err(|error| linker(&error))?
            };
        }
        let functions = Functions {
            version: function!(b"ncclGetVersion\0"),
            unique_id: function!(b"ncclGetUniqueId\0"),
            init: function!(b"ncclCommInitRankConfig\0"),
            async_error: function!(b"ncclCommGetAsyncError\0"),
            abort: function!(b"ncclCommAbort\0"),
            finalize: function!(b"ncclCommFinalize\0"),
            destroy: function!(b"ncclCommDestroy\0"),
            group_start: function!(b"ncclGroupStart\0"),
            group_end: function!(b"ncclGroupEnd\0"),
            error_string: function!(b"ncclGetErrorString\0"),
            last_error: function!(b"ncclGetLastError\0"),
            all_reduce: function!(b"ncclAllReduce\0"),
            reduce_scatter: function!(b"ncclReduceScatter\0"),
            all_gather: function!(b"ncclAllGather\0"),
            broadcast: function!(b"ncclBroadcast\0"),
        };
        Ok(Arc::new(Self { functions, _library: ManuallyDrop::new(library) }))
    }

    /// The library's version: major, minor, patch.
    ///
    /// # Errors
    /// The library's message.
    pub fn version(&self) -> Result<(i32, i32, i32), String> {
        let mut code = 0;
        // SAFETY: a number to write to.
        self.check(unsafe { (self.functions.version)(&raw mut code) }, None)?;
        Ok((code / 10_000, code % 10_000 / 100, code % 100))
    }

    /// A new identity for a communicator, which all of its ranks pass to [`Comm::join`].
    ///
    /// # Errors
    /// The library's message: no network interface, for example.
    pub fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; UNIQUE_ID_BYTES] };
        // SAFETY: an id to write to.
        self.check(unsafe { (self.functions.unique_id)(&raw mut id) }, None)?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Turns a result into the library's words, with what it noted about the communicator.
    fn check(&self, status: Status, comm: Option<ncclComm_t>) -> Result<State, String> {
        match status {
            SUCCESS => return Ok(State::Queued),
            IN_PROGRESS => return Ok(State::InProgress),
            _ => {}
        }
        let comm = comm.unwrap_or(std::ptr::null_mut());
        // SAFETY: both return strings of the library's own; a null communicator is allowed.
        let [what, detail] = unsafe {
            [text((self.functions.error_string)(status)), text((self.functions.last_error)(comm))]
        };
        // The library ends its note with a line feed and the place in its source.
        let detail = detail.lines().next().unwrap_or("").trim();
        Err(if detail.is_empty() { what } else { format!("{what}: {detail}") })
    }
}

/// The dynamic linker's own words, which the crate keeps apart.
fn linker(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// # Safety
/// `pointer` is null or a NUL-terminated string.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null, so a string as the caller promised.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

impl Comm {
    /// Begins to join the communicator of `id` as `rank` of `world_size`, on the current device.
    /// It is there when [`Comm::state`] is [`State::Queued`].
    ///
    /// # Errors
    /// The library's message.
    pub fn join(
        nccl: &Arc<Nccl>,
        id: &UniqueId,
        rank: usize,
        world_size: usize,
    ) -> Result<Self, String> {
        let number = |value: usize| c_int::try_from(value).map_err(|error| error.to_string());
        let id = ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let mut config = nonblocking();
        let mut raw = std::ptr::null_mut();
        let (rank, world_size) = (number(rank)?, number(world_size)?);
        // SAFETY: a handle and a configuration to write to; the library copies the configuration.
        let status =
            unsafe { (nccl.functions.init)(&raw mut raw, world_size, id, rank, &raw mut config) };
        let comm = Self { nccl: Arc::clone(nccl), raw: (!raw.is_null()).then_some(raw) };
        match nccl.check(status, comm.raw) {
            Ok(_) if comm.raw.is_none() => Err("no communicator was made".into()),
            Ok(_) => Ok(comm),
            Err(message) => {
                comm.abort();
                Err(message)
            }
        }
    }

    /// How far the work started so far is.
    ///
    /// # Errors
    /// The library's message when this rank or a peer has failed; only [`Comm::abort`] is left.
    pub fn state(&self) -> Result<State, String> {
        let mut state = SUCCESS;
        // SAFETY: a live communicator and a number to write to.
        let status = unsafe { (self.nccl.functions.async_error)(self.raw(), &raw mut state) };
        self.check(status)?;
        self.nccl.check(state, self.raw)
    }

    /// Starts reducing a contiguous tensor over all ranks, in place.
    ///
    /// # Errors
    /// The library's message.
    pub fn all_reduce(&self, tensor: &Tensor, op: Reduction, on: &Stream) -> Result<(), String> {
        let place = tensor.data_ptr();
        self.reduce(self.nccl.functions.all_reduce, [place, place], tensor, 1, op, on)
    }

    /// Starts reducing equal `parts` of a contiguous tensor: part `rank` holds this rank's.
    ///
    /// # Errors
    /// The library's message.
    pub fn reduce_scatter(
        &self,
        whole: &Tensor,
        (rank, parts): (usize, usize),
        op: Reduction,
        on: &Stream,
    ) -> Result<(), String> {
        let places = [whole.data_ptr(), part_of(whole, rank, parts)];
        self.reduce(self.nccl.functions.reduce_scatter, places, whole, parts, op, on)
    }

    fn reduce(
        &self,
        function: Reduce,
        [from, to]: [*mut c_void; 2],
        tensor: &Tensor,
        parts: usize,
        op: Reduction,
        on: &Stream,
    ) -> Result<(), String> {
        // ncclRedOp_t: sum 0, product 1, max 2, min 3.
        let op = match op {
            Reduction::Sum => 0,
            Reduction::Max => 2,
            Reduction::Min => 3,
        };
        let (count, dtype, stream) = (tensor.numel() / parts, dtype(tensor)?, handle(on)?);
        // SAFETY: `tensor` is contiguous memory of its device and outlives the work on the stream,
        // which the caller sees to by waiting before dropping it.
        self.check(unsafe { function(from, to, count, dtype, op, self.raw(), stream) })
    }

    /// Starts collecting equal `parts` of a contiguous tensor, of which this rank has part `rank`.
    ///
    /// # Errors
    /// The library's message.
    pub fn all_gather(
        &self,
        whole: &Tensor,
        (rank, parts): (usize, usize),
        on: &Stream,
    ) -> Result<(), String> {
        let (count, dtype, stream) = (whole.numel() / parts, dtype(whole)?, handle(on)?);
        let (from, to) = (part_of(whole, rank, parts), whole.data_ptr());
        // SAFETY: as in `reduce`.
        let status =
            unsafe { (self.nccl.functions.all_gather)(from, to, count, dtype, self.raw(), stream) };
        self.check(status)
    }

    /// Starts copying `root`'s contiguous tensor into that of every rank.
    ///
    /// # Errors
    /// The library's message.
    pub fn broadcast(&self, tensor: &Tensor, root: usize, on: &Stream) -> Result<(), String> {
        let root = c_int::try_from(root).map_err(|error| error.to_string())?;
        let (count, dtype, stream) = (tensor.numel(), dtype(tensor)?, handle(on)?);
        let place = tensor.data_ptr();
        // SAFETY: as in `reduce`.
        let status = unsafe {
            (self.nccl.functions.broadcast)(place, place, count, dtype, root, self.raw(), stream)
        };
        self.check(status)
    }

    /// Ends the communicator at once, on this rank; work on the stream comes to an end.
    pub fn abort(mut self) {
        if let Some(raw) = self.raw.take() {
            // SAFETY: a live communicator, not used afterwards. Its answer changes nothing.
            unsafe { (self.nccl.functions.abort)(raw) };
        }
    }

    /// Ends communicators of one device at once, as [`Comm::abort`] does one. The work of all of them is
    /// told to stop before the first is freed: freeing waits for the device, where the work of another
    /// would go on waiting for its peers (pytorch issue 119797).
    pub fn abort_all(comms: Vec<Self>) {
        let Some(nccl) = comms.first().map(|comm| Arc::clone(&comm.nccl)) else { return };
        // SAFETY: begins a group of this thread's calls, which ends below. Its answer changes nothing.
        unsafe { (nccl.functions.group_start)() };
        comms.into_iter().for_each(Self::abort);
        // SAFETY: ends that group. It returns once all of its communicators are freed.
        unsafe { (nccl.functions.group_end)() };
    }

    /// Begins to end the communicator in order, together with its peers; [`Comm::free`] follows
    /// when [`Comm::state`] is [`State::Queued`].
    ///
    /// # Errors
    /// The library's message.
    pub fn leave(&self) -> Result<(), String> {
        // SAFETY: a live communicator.
        self.check(unsafe { (self.nccl.functions.finalize)(self.raw()) })
    }

    /// Frees a communicator that has left.
    pub fn free(mut self) {
        if let Some(raw) = self.raw.take() {
            // SAFETY: a live communicator, not used afterwards. Its answer changes nothing.
            unsafe { (self.nccl.functions.destroy)(raw) };
        }
    }

    fn raw(&self) -> ncclComm_t {
        self.raw.expect("a communicator is not used after its end")
    }

    fn check(&self, status: Status) -> Result<(), String> {
        self.nccl.check(status, self.raw).map(|_| ())
    }
}

/// A configuration that leaves everything to the library, except that no call may block.
fn nonblocking() -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// `ncclDataType_t`.
fn dtype(tensor: &Tensor) -> Result<c_int, String> {
    match tensor.f_kind().map_err(|error| error.to_string())? {
        Kind::Int8 => Ok(0),
        Kind::Uint8 => Ok(1),
        Kind::Int => Ok(2),
        Kind::Int64 => Ok(4),
        Kind::Half => Ok(6),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        other => Err(format!("no collective takes {other:?}")),
    }
}

fn part_of(whole: &Tensor, rank: usize, parts: usize) -> *mut c_void {
    let width = whole.kind().elt_size_in_bytes();
    whole.data_ptr().wrapping_byte_add(whole.numel() / parts * rank * width)
}

fn handle(stream: &Stream) -> Result<Stream_, String> {
    stream.handle().map_err(|error| error.to_string())
}
