/*
 * libvirt, loaded when it is first asked for something.
 *
 * The library brings some fifty others with it, and loading them takes longer than all else that `config` and most calls of
 * `run` do: neither asks libvirt anything. So the program is not linked with it. The functions that the binding calls stand
 * here under their own names; each finds the real one when it is first called.
 *
 * A function that is missing here brings the library back into the link, which is slow and right; a test of the program
 * notices that.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <threads.h>

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

/* The name under which every libvirt since 0.0.1 is installed. */
#define LIBRARY "libvirt.so.0"

static once_flag once = ONCE_FLAG_INIT;
static void *library;
static char reason[512];

static void load(void)
{
    library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        snprintf(reason, sizeof(reason), "%s", dlerror());
}

static void *find(const char *name)
{
    void *function = NULL;

    call_once(&once, load);
    if (library)
        function = dlsym(library, name);
    if (!function) {
        /* Nobody gets a connection without the library, and only with one are the others called. */
        fprintf(stderr, "cannery: %s has no %s\n", LIBRARY, name);
        abort();
    }
    return function;
}

/* Every thread finds the same function, so that none has to wait for another. */
#define LAZY(result, name, parameters, arguments)            \
    __attribute__((visibility("hidden"))) result name parameters \
    {                                                        \
        static _Atomic(__typeof__(&name)) found;             \
        __typeof__(&name) real = found;                      \
        if (!real)                                           \
            found = real = (__typeof__(&name))find(#name);   \
        return real arguments;                               \
    }

/* What is called before there is a connection says why there is none. */

static virError missing = { .code = VIR_ERR_NO_SUPPORT, .message = reason, .level = VIR_ERR_ERROR };
static thread_local int is_missing;

static virConnectPtr open_real(const char *name) { return ((virConnectPtr(*)(const char *))find("virConnectOpen"))(name); }

__attribute__((visibility("hidden"))) virConnectPtr virConnectOpen(const char *name)
{
    call_once(&once, load);
    is_missing = !library;
    return library ? open_real(name) : NULL;
}

__attribute__((visibility("hidden"))) virErrorPtr virGetLastError(void)
{
    if (is_missing)
        return &missing;
    return ((virErrorPtr(*)(void))find("virGetLastError"))();
}

__attribute__((visibility("hidden"))) void virSetErrorFunc(void *data, virErrorFunc function)
{
    call_once(&once, load);
    if (library)
        ((void (*)(void *, virErrorFunc))find("virSetErrorFunc"))(data, function);
}

LAZY(int, virConnectClose, (virConnectPtr c), (c))
LAZY(char *, virConnectGetDomainCapabilities,
     (virConnectPtr c, const char *emulator, const char *arch, const char *machine, const char *type, unsigned int flags),
     (c, emulator, arch, machine, type, flags))
LAZY(int, virConnectGetLibVersion, (virConnectPtr c, unsigned long *version), (c, version))
LAZY(const char *, virConnectGetType, (virConnectPtr c), (c))
LAZY(int, virConnectGetVersion, (virConnectPtr c, unsigned long *version), (c, version))
LAZY(int, virConnectIsAlive, (virConnectPtr c), (c))
LAZY(int, virConnectListAllDomains, (virConnectPtr c, virDomainPtr **domains, unsigned int flags), (c, domains, flags))
LAZY(virDomainPtr, virDomainCreateXML, (virConnectPtr c, const char *xml, unsigned int flags), (c, xml, flags))
LAZY(virDomainPtr, virDomainDefineXML, (virConnectPtr c, const char *xml), (c, xml))
LAZY(int, virDomainDestroy, (virDomainPtr d), (d))
LAZY(int, virDomainFree, (virDomainPtr d), (d))
LAZY(char *, virDomainGetMetadata, (virDomainPtr d, int type, const char *uri, unsigned int flags), (d, type, uri, flags))
LAZY(const char *, virDomainGetName, (virDomainPtr d), (d))
LAZY(int, virDomainGetState, (virDomainPtr d, int *state, int *reason, unsigned int flags), (d, state, reason, flags))
LAZY(int, virDomainGetUUID, (virDomainPtr d, unsigned char *uuid), (d, uuid))
LAZY(char *, virDomainGetXMLDesc, (virDomainPtr d, unsigned int flags), (d, flags))
LAZY(int, virDomainHasManagedSaveImage, (virDomainPtr d, unsigned int flags), (d, flags))
LAZY(int, virDomainInterfaceAddresses,
     (virDomainPtr d, virDomainInterfacePtr **interfaces, unsigned int source, unsigned int flags),
     (d, interfaces, source, flags))
LAZY(int, virDomainIsActive, (virDomainPtr d), (d))
LAZY(virDomainPtr, virDomainLookupByName, (virConnectPtr c, const char *name), (c, name))
LAZY(virDomainPtr, virDomainLookupByUUIDString, (virConnectPtr c, const char *uuid), (c, uuid))
LAZY(int, virDomainOpenGraphics, (virDomainPtr d, unsigned int screen, int fd, unsigned int flags), (d, screen, fd, flags))
LAZY(char *, virDomainScreenshot, (virDomainPtr d, virStreamPtr s, unsigned int screen, unsigned int flags), (d, s, screen, flags))
LAZY(int, virDomainSendKey,
     (virDomainPtr d, unsigned int codeset, unsigned int hold, unsigned int *keys, int count, unsigned int flags),
     (d, codeset, hold, keys, count, flags))
LAZY(int, virNetworkCreate, (virNetworkPtr n), (n))
LAZY(virNetworkPtr, virNetworkDefineXML, (virConnectPtr c, const char *xml), (c, xml))
LAZY(int, virNetworkDestroy, (virNetworkPtr n), (n))
LAZY(int, virNetworkFree, (virNetworkPtr n), (n))
LAZY(char *, virNetworkGetBridgeName, (virNetworkPtr n), (n))
LAZY(char *, virNetworkGetXMLDesc, (virNetworkPtr n, unsigned int flags), (n, flags))
LAZY(int, virNetworkIsActive, (virNetworkPtr n), (n))
LAZY(int, virNetworkIsPersistent, (virNetworkPtr n), (n))
LAZY(virNetworkPtr, virNetworkLookupByName, (virConnectPtr c, const char *name), (c, name))
LAZY(int, virNetworkUndefine, (virNetworkPtr n), (n))
LAZY(int, virStreamAbort, (virStreamPtr s), (s))
LAZY(int, virStreamEventRemoveCallback, (virStreamPtr s), (s))
LAZY(int, virStreamFinish, (virStreamPtr s), (s))
LAZY(int, virStreamFree, (virStreamPtr s), (s))
LAZY(virStreamPtr, virStreamNew, (virConnectPtr c, unsigned int flags), (c, flags))
LAZY(int, virStreamRecv, (virStreamPtr s, char *data, size_t length), (s, data, length))
