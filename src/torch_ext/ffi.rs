//! The C ABI of `csrc/`, declared once. Struct layouts repeat those of the C++ side.

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

/// A process group of the shim; opaque.
#[repr(C)]
pub(super) struct Group {
    _opaque: [u8; 0],
}

/// A collective under way; opaque.
#[repr(C)]
pub(super) struct Work {
    _opaque: [u8; 0],
}

/// A stream of a device; opaque.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Stream {
    _opaque: [u8; 0],
}

/// A place in a stream; opaque.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Event {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub eps: f64,
}

#[repr(C)]
pub(super) struct Attention {
    pub cu_seqlens: *const i64,
    pub boundaries: usize,
    pub heads: i64,
    pub kv_heads: i64,
    pub left: i64,
    pub right: i64,
    pub scale: f64,
    pub dropout: f64,
    pub seed: i64,
}

#[repr(C)]
pub(super) struct GlooJoin {
    pub host: *const c_char,
    pub port: u16,
    pub serves_store: bool,
    pub rank: c_int,
    pub world_size: c_int,
    pub joining_ms: i64,
    pub timeout_ms: i64,
    pub local_address: *const c_char,
    pub interfaces: *const c_char,
    pub way: *const c_char,
    pub asks_the_way: bool,
    pub prefix: *const c_char,
    pub is_lasting: bool,
}

unsafe extern "C" {
    pub(super) fn rr_free_message(text: *mut c_char);

    pub(super) fn rr_backward(
        roots: *const *const C_tensor,
        grads: *const *const C_tensor,
        count: usize,
    ) -> *mut c_char;
    pub(super) fn rr_set_grad(leaf: *const C_tensor, grad: *const C_tensor) -> *mut c_char;
    pub(super) fn rr_storage_resize(tensor: *const C_tensor, bytes: usize) -> *mut c_char;
    pub(super) fn rr_storage_bytes(tensor: *const C_tensor) -> usize;
    pub(super) fn rr_deterministic_algorithms() -> *mut c_char;
    pub(super) fn rr_peak_gpu_bytes(device: c_int, out: *mut usize) -> *mut c_char;
    pub(super) fn rr_fused_adamw(
        param: *const C_tensor,
        grad: *const C_tensor,
        exp_avg: *const C_tensor,
        exp_avg_sq: *const C_tensor,
        step: *const C_tensor,
        options: *const AdamW,
    ) -> *mut c_char;

    pub(super) fn rr_packed_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        options: *const Attention,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(super) fn rr_flash_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        options: *const Attention,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(super) fn rr_efficient_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        options: *const Attention,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;

    pub(super) fn rr_set_device(index: c_int) -> *mut c_char;
    pub(super) fn rr_stream_new(index: c_int, out: *mut *mut Stream) -> *mut c_char;
    pub(super) fn rr_stream_free(stream: *mut Stream);
    pub(super) fn rr_stream_handle(stream: *const Stream, out: *mut *mut c_void) -> *mut c_char;
    pub(super) fn rr_stream_follow(stream: *const Stream) -> *mut c_char;
    pub(super) fn rr_stream_mark(stream: *const Stream, out: *mut *mut Event) -> *mut c_char;
    pub(super) fn rr_event_done(event: *const Event, out: *mut bool) -> *mut c_char;
    pub(super) fn rr_event_hold(event: *const Event) -> *mut c_char;
    pub(super) fn rr_event_free(event: *mut Event);
    pub(super) fn rr_device_memory(
        index: c_int,
        free: *mut usize,
        total: *mut usize,
        peak: *mut usize,
    ) -> *mut c_char;

    pub(super) fn rr_gloo_join(join: *const GlooJoin, out: *mut *mut Group) -> *mut c_char;
    pub(super) fn rr_gloo_split(
        group: *mut Group,
        rank: c_int,
        size: c_int,
        name: *const c_char,
        out: *mut *mut Group,
    ) -> *mut c_char;
    pub(super) fn rr_gloo_leave(group: *mut Group);
    pub(super) fn rr_gloo_all_reduce(
        group: *mut Group,
        tensor: *const C_tensor,
        op: c_int,
        out: *mut *mut Work,
    ) -> *mut c_char;
    pub(super) fn rr_gloo_broadcast(
        group: *mut Group,
        tensor: *const C_tensor,
        root: c_int,
        out: *mut *mut Work,
    ) -> *mut c_char;
    pub(super) fn rr_gloo_barrier(group: *mut Group, out: *mut *mut Work) -> *mut c_char;
    pub(super) fn rr_gloo_wait(work: *mut Work) -> *mut c_char;
    pub(super) fn rr_gloo_forget(work: *mut Work);
}
