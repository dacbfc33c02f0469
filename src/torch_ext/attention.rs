//! Self-attention over packed sequences: this crate's own kernel on the CPU, libtorch's kernels for
//! sequences of different lengths on CUDA, and its attention a sequence at a time for the rest.

use tch::{Device, Kind, Tensor};

use super::storage::upload;
use super::{check, ffi};
use crate::error::{Error, Result};

/// Where the sequences of a packed batch begin and end: `[sequences + 1]`, rising from 0 to the
/// number of tokens.
#[derive(Debug)]
pub struct CuSeqlens {
    host: Vec<i64>,
    /// The same as int32 where a kernel of the device reads it.
    device: Option<Tensor>,
    longest: i64,
}

impl CuSeqlens {
    /// The boundaries for attention on `device`, copied there once for all layers.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has no room.
    pub fn new(boundaries: &[i64], device: Device) -> Result<Self> {
        let on_device = if device == Device::Cpu {
            None
        } else {
            let narrow = Tensor::f_from_slice(boundaries)?.f_to_kind(Kind::Int)?;
            Some(upload(&narrow, device)?)
        };
        let longest = boundaries.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        Ok(Self { host: boundaries.to_vec(), device: on_device, longest })
    }

    /// The boundaries on the host.
    #[must_use]
    pub fn as_slice(&self) -> &[i64] {
        &self.host
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.host.last().copied().unwrap_or(0) as usize
    }

    /// Number of sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.host.len().saturating_sub(1)
    }
}

/// Which keys a query sees: from `left` positions before its own to `right` after it, its own
/// included; `None` is without limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Keys before the own position.
    pub left: Option<i64>,
    /// Keys after the own position.
    pub right: Option<i64>,
}

impl Window {
    /// Every key of the sequence.
    pub const FULL: Self = Self { left: None, right: None };
    /// The own position and all before it.
    pub const CAUSAL: Self = Self { left: None, right: Some(0) };

    /// The last `size` positions, the own one included: `i - size < j <= i`, as transformers'
    /// `sliding_window` of decoders.
    #[must_use]
    pub fn causal(size: i64) -> Self {
        Self { left: Some(size - 1), right: Some(0) }
    }

    /// Positions at most `radius` away on either side: `|i - j| <= radius`; `ModernBERT`'s
    /// `local_attention` is twice that.
    #[must_use]
    pub fn local(radius: i64) -> Self {
        Self { left: Some(radius), right: Some(radius) }
    }
}

/// Queries, keys and values of packed tokens, all of one dtype and on one device.
#[derive(Debug, Clone, Copy)]
pub enum Projections<'a> {
    /// One product gave them all: `[T, (heads + 2 * kv_heads) * dim]`, a token's queries, then its
    /// keys, then its values.
    Fused(&'a Tensor),
    /// Each by itself; their rows may stand apart.
    Split {
        /// `[T, heads, dim]`.
        query: &'a Tensor,
        /// `[T, kv_heads, dim]`.
        key: &'a Tensor,
        /// `[T, kv_heads, dim]`.
        value: &'a Tensor,
    },
}

impl Projections<'_> {
    fn query(&self) -> &Tensor {
        match self {
            Self::Fused(all) => all,
            Self::Split { query, .. } => query,
        }
    }

    /// Queries `[T, heads, dim]`, keys and values `[T, kv_heads, dim]`, without a copy.
    fn split(&self, options: &AttentionOptions<'_>) -> Result<[Tensor; 3]> {
        let qkv = match self {
            Self::Fused(qkv) => qkv,
            Self::Split { query, key, value } => {
                return Ok([query, key, value].map(|part| part.shallow_clone()));
            }
        };
        let (tokens, width) = qkv.size2()?;
        let heads = [options.heads, options.kv_heads, options.kv_heads];
        let all = heads.iter().sum::<i64>();
        if width % all != 0 {
            return Err(Error::Torch(format!("a width of {width} does not divide by {all} heads")));
        }
        let parts = qkv.f_view([tokens, all, width / all])?.f_split_with_sizes(heads, 1)?;
        <[Tensor; 3]>::try_from(parts).map_err(|_| Error::Torch("expected three parts".into()))
    }
}

/// How to attend.
#[derive(Debug, Clone, Copy)]
pub struct AttentionOptions<'a> {
    /// The sequences.
    pub cu_seqlens: &'a CuSeqlens,
    /// Number of query heads.
    pub heads: i64,
    /// Number of key and value heads; it divides `heads`, and consecutive query heads share one
    /// (grouped-query attention, Ainslie et al., 2023).
    pub kv_heads: i64,
    /// Which keys a query sees.
    pub window: Window,
    /// Factor on the scores, usually `1 / sqrt(dim)`.
    pub scale: f64,
    /// Probability of dropping an attention weight, in `[0, 1)`; 0 when not training.
    pub dropout: f64,
    /// Seed of the dropout pattern; the same seed gives the same pattern. Kernels of libtorch draw
    /// from its generator instead, which the caller has seeded.
    pub seed: i64,
}

/// The ways to compute attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Our own, in fp32.
    Cpu,
    /// libtorch's flash attention over `cu_seqlens`.
    Flash,
    /// libtorch's memory-efficient attention over `cu_seqlens`.
    Efficient,
    /// libtorch's `scaled_dot_product_attention`, one call a sequence.
    PerSequence,
}

/// The fused kernels that a GPU has for some heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fused {
    /// None.
    None,
    /// Memory-efficient attention.
    Efficient,
    /// Flash attention and memory-efficient attention.
    Flash,
}

impl Kernel {
    /// The fastest that computes what is asked for, of what the device has.
    fn choose(device: Device, kind: Kind, dim: i64, window: Window, fused: Fused) -> Self {
        let half = matches!(kind, Kind::BFloat16 | Kind::Half);
        // Kernels load 16 bytes at a time.
        let aligned = dim % if half { 8 } else { 4 } == 0;
        match device {
            // libtorch's attention in low precision is slow on the CPU, and no more exact.
            Device::Cpu if half || kind == Kind::Float => Self::Cpu,
            Device::Cuda(_) if half && fused == Fused::Flash && aligned && dim <= 256 => {
                Self::Flash
            }
            Device::Cuda(_)
                if (half || kind == Kind::Float)
                    && fused != Fused::None
                    && aligned
                    && matches!(window, Window::FULL | Window::CAUSAL) =>
            {
                Self::Efficient
            }
            _ => Self::PerSequence,
        }
    }
}

/// Softmax attention inside each sequence: `softmax(scale * q k^T) v` over the keys that `window`
/// lets a query see. Returns `[T, heads * dim]`; differentiable.
///
/// # Errors
/// [`Error::Torch`] when shapes, dtypes or boundaries do not fit, or the device has no room.
pub fn packed_attention(
    projections: Projections<'_>,
    options: AttentionOptions<'_>,
) -> Result<Tensor> {
    let (device, kind) = (projections.query().device(), projections.query().f_kind()?);
    if let Device::Cpu = device
        && Kernel::choose(device, kind, 0, options.window, Fused::None) == Kernel::Cpu
    {
        return cpu_kernel(projections, kind, &options);
    }
    let parts = projections.split(&options)?;
    let dim = parts[0].size3()?.2;
    let fused = match device {
        Device::Cuda(_) => fused(&parts[0], &options)?,
        _ => Fused::None,
    };
    match Kernel::choose(device, kind, dim, options.window, fused) {
        kernel @ (Kernel::Flash | Kernel::Efficient) if options.cu_seqlens.longest > 0 => {
            cuda_kernel(kernel, &parts, &options)
        }
        _ => per_sequence(projections, options),
    }
}

/// Attention by libtorch's `scaled_dot_product_attention`, one call a sequence, on any device and
/// in any precision. Dropout draws from libtorch's generator, which the caller has seeded.
///
/// # Errors
/// [`Error::Torch`] when shapes or boundaries do not fit, or the device has no room.
pub fn per_sequence(projections: Projections<'_>, options: AttentionOptions<'_>) -> Result<Tensor> {
    let parts = projections.split(&options)?;
    let (tokens, heads, dim) = parts[0].size3()?;
    if options.cu_seqlens.tokens() as i64 != tokens {
        return Err(Error::Torch(format!("cu_seqlens must end at {tokens}, the number of tokens")));
    }
    let window = options.window;
    let mut outputs = Vec::with_capacity(options.cu_seqlens.sequences());
    for bounds in options.cu_seqlens.as_slice().windows(2) {
        let length = bounds[1] - bounds[0];
        if length == 0 {
            continue;
        }
        // [L, heads, dim] -> [1, heads, L, dim]
        let part = |which: usize| -> Result<Tensor> {
            let rows = parts[which].f_narrow(0, bounds[0], length)?;
            Ok(rows.f_transpose(0, 1)?.f_unsqueeze(0)?)
        };
        let plain = matches!(window, Window::FULL | Window::CAUSAL);
        let mask = if plain { None } else { Some(window_mask(window, length, parts[0].device())?) };
        let out = Tensor::f_scaled_dot_product_attention(
            &part(0)?,
            &part(1)?,
            &part(2)?,
            mask.as_ref(),
            options.dropout,
            window == Window::CAUSAL,
            options.scale,
            options.kv_heads != options.heads,
        )?;
        outputs.push(out.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([length, heads * dim])?);
    }
    if outputs.is_empty() {
        return Ok(parts[0].f_reshape([tokens, heads * dim])?);
    }
    Ok(Tensor::f_cat(&outputs, 0)?)
}

/// `[length, length]`, true where the query of a row sees the key of a column.
fn window_mask(window: Window, length: i64, device: Device) -> Result<Tensor> {
    let all = Tensor::f_ones([length, length], (Kind::Bool, device))?;
    let left = window.left.map_or_else(|| Ok(all.shallow_clone()), |left| all.f_triu(-left))?;
    Ok(window.right.map_or_else(|| Ok(left.shallow_clone()), |right| left.f_tril(right))?)
}

/// What the device has for heads like those of `query`, as libtorch chooses itself: by its build and by
/// the generation of the GPU (before Ampere no kernel takes bf16). Of the query alone: a choice for
/// shared key heads knows no memory-efficient attention, to which they are expanded here.
fn fused(query: &Tensor, options: &AttentionOptions<'_>) -> Result<Fused> {
    // sdp::SDPBackend
    const MATH: i64 = 0;
    const EFFICIENT: i64 = 2;
    let heads = query.f_transpose(0, 1)?.f_unsqueeze(0)?;
    let choice = Tensor::f_internal_fused_sdp_choice(
        &heads,
        &heads,
        &heads,
        None::<&Tensor>,
        options.dropout,
        options.window == Window::CAUSAL,
        options.scale,
        false,
    )?;
    Ok(match choice {
        MATH => Fused::None,
        EFFICIENT => Fused::Efficient,
        // cuDNN's, where it is preferred, comes with flash attention.
        _ => Fused::Flash,
    })
}

fn cuda_kernel(
    kernel: Kernel,
    parts: &[Tensor; 3],
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    let [query, key, value] = parts;
    let (tokens, heads, dim) = query.size3()?;
    let Some(cu_seqlens) = &options.cu_seqlens.device else {
        return Err(Error::Torch("cu_seqlens was not made for the device of the tensors".into()));
    };
    let longest = options.cu_seqlens.longest;
    let mut raw = options.raw();
    let mut out = std::ptr::null_mut();
    let message = if kernel == Kernel::Flash {
        let [q, k, v] = [query, key, value].map(Tensor::as_ptr);
        // SAFETY: live tensors and options, borrowed for the call.
        unsafe {
            ffi::rr_flash_attention(
                q,
                k,
                v,
                cu_seqlens.as_ptr(),
                longest,
                &raw mut raw,
                &raw mut out,
            )
        }
    } else {
        // This kernel knows no groups of heads.
        let groups = options.heads / options.kv_heads;
        let each = |heads: &Tensor| match groups {
            1 => Ok(heads.shallow_clone()),
            _ => heads.f_repeat_interleave_self_int(groups, 1, None),
        };
        let [key, value] = [each(key)?, each(value)?];
        raw.kv_heads = raw.heads;
        let [q, k, v] = [query, &key, &value].map(Tensor::as_ptr);
        // SAFETY: live tensors and options, borrowed for the call.
        unsafe {
            ffi::rr_efficient_attention(
                q,
                k,
                v,
                cu_seqlens.as_ptr(),
                longest,
                &raw mut raw,
                &raw mut out,
            )
        }
    };
    check(message).map_err(Error::Torch)?;
    // SAFETY: success means that `out` is a new tensor that nobody else owns.
    let out = unsafe { Tensor::from_ptr(out) };
    Ok(out.f_reshape([tokens, heads * dim])?)
}

/// Our kernel; low precision is converted, as its products are fp32.
fn cpu_kernel(
    projections: Projections<'_>,
    kind: Kind,
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    let fp32 = |x: &Tensor| x.f_to_kind(Kind::Float);
    let parts = match projections {
        Projections::Fused(qkv) => [Some(fp32(qkv)?), None, None],
        Projections::Split { query, key, value } => {
            [Some(fp32(query)?), Some(fp32(key)?), Some(fp32(value)?)]
        }
    };
    let [q, k, v] =
        parts.each_ref().map(|part| part.as_ref().map_or(std::ptr::null(), Tensor::as_ptr));
    let raw = options.raw();
    let mut out = std::ptr::null_mut();
    // SAFETY: `raw` points to a slice that outlives the call; the C++ side copies it. The tensors
    // live in `parts`.
    check(unsafe { ffi::rr_packed_attention(q, k, v, &raw const raw, &raw mut out) })
        .map_err(Error::Torch)?;
    // SAFETY: success means that `out` is a new tensor that nobody else owns.
    let out = unsafe { Tensor::from_ptr(out) };
    Ok(out.f_to_kind(kind)?)
}

impl AttentionOptions<'_> {
    fn raw(&self) -> ffi::Attention {
        let boundaries = self.cu_seqlens.as_slice();
        ffi::Attention {
            cu_seqlens: boundaries.as_ptr(),
            boundaries: boundaries.len(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            left: self.window.left.unwrap_or(-1),
            right: self.window.right.unwrap_or(-1),
            scale: self.scale,
            dropout: self.dropout,
            seed: self.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_kernel_that_fits_is_chosen() {
        use Kernel::{Cpu, Efficient, Flash, PerSequence};
        let [none, some, all] = [Fused::None, Fused::Efficient, Fused::Flash];
        let gpu = Device::Cuda(0);
        let sliding = Window::causal(4);
        for (device, kind, dim, window, fused, expected) in [
            (Device::Cpu, Kind::Float, 5, sliding, none, Cpu),
            (Device::Cpu, Kind::BFloat16, 64, Window::FULL, none, Cpu),
            (Device::Cpu, Kind::Double, 64, Window::FULL, none, PerSequence),
            (gpu, Kind::BFloat16, 64, Window::FULL, all, Flash),
            (gpu, Kind::Half, 256, sliding, all, Flash),
            (gpu, Kind::BFloat16, 64, Window::CAUSAL, none, PerSequence),
            (gpu, Kind::BFloat16, 64, Window::CAUSAL, some, Efficient),
            (gpu, Kind::BFloat16, 36, Window::CAUSAL, all, PerSequence),
            (gpu, Kind::BFloat16, 264, Window::CAUSAL, all, Efficient),
            (gpu, Kind::BFloat16, 264, sliding, all, PerSequence),
            (gpu, Kind::Float, 64, Window::CAUSAL, all, Efficient),
            (gpu, Kind::Float, 64, Window::local(8), all, PerSequence),
            (gpu, Kind::Float, 6, Window::FULL, all, PerSequence),
            (gpu, Kind::Double, 64, Window::FULL, all, PerSequence),
        ] {
            let chosen = Kernel::choose(device, kind, dim, window, fused);
            assert_eq!(chosen, expected, "{device:?} {kind:?} {dim} {window:?} {fused:?}");
        }
    }

    #[test]
    fn a_window_counts_the_own_position() {
        let seen = |window| -> Vec<f64> {
            let mask = window_mask(window, 4, Device::Cpu).expect("four by four");
            Vec::try_from(mask.sum_dim_intlist(1, false, Kind::Double)).expect("four sums")
        };
        assert_eq!(seen(Window::FULL), [4.0; 4]);
        assert_eq!(seen(Window::CAUSAL), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(seen(Window::causal(2)), [1.0, 2.0, 2.0, 2.0]);
        assert_eq!(seen(Window::local(1)), [2.0, 3.0, 3.0, 2.0]);
    }
}
