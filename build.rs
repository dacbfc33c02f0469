//! Compiles the C++ shim over libtorch and gives every binary an rpath to the libtorch it was
//! built with, so that nobody sets `LD_LIBRARY_PATH`.

use std::path::{Path, PathBuf};

const SOURCES: [&str; 5] =
    ["autograd.cpp", "attention.cpp", "attention_cuda.cpp", "gloo.cpp", "stream.cpp"];

const CHOICE: &str = ".libtorch.path";

fn main() {
    let lib = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch is"),
    );
    let lib = lib.canonicalize().unwrap_or(lib);
    let include = lib.parent().expect("libtorch's lib folder has a parent").join("include");
    let dir = Path::new("src/torch_ext/csrc");
    println!("cargo:rerun-if-changed={}", dir.display());
    // scripts/setup.sh notes here which libtorch the link leads to; cargo does not see a link change.
    if Path::new(CHOICE).exists() {
        println!("cargo:rerun-if-changed={CHOICE}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .files(SOURCES.map(|name| dir.join(name)))
        .include(dir.join("gloo_decl"))
        // Their warnings are not ours to mend.
        .flag(format!("-isystem{}", include.display()))
        .flag(format!("-isystem{}", include.join("torch/csrc/api/include").display()))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        // at::parallel_for is a header template; the runtime is the libgomp that libtorch brings.
        .flag("-fopenmp")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .opt_level(3)
        .debug(false)
        .compile("rr_shim");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    println!("cargo:rustc-link-arg=-l:libgomp.so.1");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
