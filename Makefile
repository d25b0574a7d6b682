# make              build target/release/cannery
# make demo         run two jobs in virtual machines on this machine, from nothing
# make demo-clean   remove what that made; packages and build stay
# make check        the quick checks: format, lints, quick tests, licences
# make test         everything: set-up, check, and the tests that need libvirt, guests and registries
# make bench        how long the stages take on this machine, with the demo's guest (docs/performance.md)
# make install      put what make built into PREFIX (/usr/local), under DESTDIR for packages
# make clean        remove what was built, the guests too

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
INSTALL ?= install

.PHONY: all build demo demo-clean check test bench install clean

all: build

build:
	$(CARGO) build --locked --release

demo:
	@contrib/demo/run

demo-clean:
	@contrib/demo/run --clean

check:
	@contrib/check

test:
	@contrib/test

bench:
	@contrib/demo/run --bench

# Builds nothing: root, who installs, often has no cargo. The new program takes the old one's place in one step, since jobs may call it
# at any moment.
install:
	@test -x target/release/cannery || \
		{ echo "target/release/cannery is missing: run 'make' first, as the user who has cargo" >&2; exit 1; }
	$(INSTALL) -D -m 0755 target/release/cannery $(DESTDIR)$(PREFIX)/bin/.cannery.new
	mv -f $(DESTDIR)$(PREFIX)/bin/.cannery.new $(DESTDIR)$(PREFIX)/bin/cannery
	test -e $(DESTDIR)/etc/cannery/cannery.toml || \
		$(INSTALL) -D -m 0644 contrib/gitlab-runner/cannery.toml $(DESTDIR)/etc/cannery/cannery.toml

clean:
	$(CARGO) clean
	rm -rf .cache
