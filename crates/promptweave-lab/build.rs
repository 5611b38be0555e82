//! Bakes the place of libtorch into the binary (rpath), so that it runs without `LD_LIBRARY_PATH`.
//! `torch-sys` tells where it linked from through `DEP_TCH_LIBTORCH_LIB` (its `links` key is `tch`).

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        // DT_RPATH, not DT_RUNPATH: it also holds for what libtorch itself opens (its own libgomp).
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{lib}");
    }
}
