# Sourced by the builders of guests: packages of the distribution, downloaded and unpacked, never installed.
# Needs $work, a scratch folder, and the functions fail and say.

# Downloads packages with all that they depend on, and unpacks them into FOLDER.
unpack_with_libraries() { # FOLDER PACKAGE…
    local folder=$1 debs
    shift
    debs=$(mktemp -d "$work/debs.XXXXXX")
    mkdir -p "$debs/partial" "$folder"
    # An empty status file makes apt believe that nothing is installed, so that it fetches libraries as well.
    : >"$work/status"
    apt-get -qq -y --no-install-recommends \
        -o Dir::State::status="$work/status" -o Dir::Cache::archives="$debs/" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root --download-only install "$@" >&2 ||
        fail "apt cannot download $*; is this machine online, and are its package lists fresh (apt-get update)?"
    unpack_all "$debs" "$folder"
}

# Downloads just these packages, and unpacks them into FOLDER.
unpack_alone() { # FOLDER PACKAGE…
    local folder=$1 debs
    shift
    debs=$(mktemp -d "$work/debs.XXXXXX")
    mkdir -p "$folder"
    (cd "$debs" && apt-get -qq -o APT::Sandbox::User=root download "$@" >&2) ||
        fail "apt cannot download $*; is this machine online, and are its package lists fresh (apt-get update)?"
    unpack_all "$debs" "$folder"
}

unpack_all() { # FOLDER-OF-DEBS FOLDER
    local deb
    for deb in "$1"/*.deb; do dpkg-deb -x "$deb" "$2"; done
}

# Unpacked programs run with the loader and the libraries that were unpacked beside them, not with this host's.
use_unpacked() { # FOLDER
    loader=$(find "$1" -path '*ld-linux-x86-64.so.2' -print -quit)
    library_path=$(find "$1" -type d -name x86_64-linux-gnu | paste -sd:)
}
run_unpacked() { "$loader" --library-path "$library_path" "$@"; }

# Stops unless these programs are there; /usr/sbin is not in every user's PATH.
need() {
    local tool
    PATH=$PATH:/usr/sbin:/sbin
    for tool in "$@"; do
        command -v "$tool" >/dev/null || fail "$tool is missing; contrib/setup installs it"
    done
}
