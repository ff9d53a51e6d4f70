"""Stand-ins for the CANN libraries, so that `torch_npu` imports on a machine without an NPU: pretend devices, and no kernel at all.

They hold what the wheel's libraries ask for by name and nothing else has. Under FakeTensorMode nothing is computed, so that the
vendor's operators say what they take and give; a real tensor on such a device does not work.
"""

import glob
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = ["libhccl.so", "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so"]
OWN = ("acl", "rt", "Msprof", "Hccl")  # how CANN's names begin

# Functions that must do something: one device, host memory in place of the device's, and no kernel (500001) where one is asked for.
WRITTEN = {
    "aclrtSetDevice": "static __thread int device; int aclrtSetDevice(int d) { device = d; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *d) { *d = device; return 0; }",
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { *n = 8; return 0; }",
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void **c) { *c = (void *)16; return 0; }",
    "aclrtCreateStream": "int aclrtCreateStream(void **s) { *s = malloc(8); return 0; }",
    "aclrtCreateStreamWithConfig": "int aclrtCreateStreamWithConfig(void **s, unsigned p, unsigned f) { *s = malloc(8); return 0; }",
    "aclrtCreateEventExWithFlag": "int aclrtCreateEventExWithFlag(void **e, unsigned f) { *e = malloc(8); return 0; }",
    "aclrtEventElapsedTime": "int aclrtEventElapsedTime(float *ms, void *a, void *b) { *ms = 0; return 0; }",
    "aclrtMalloc": "int aclrtMalloc(void **p, size_t n, int policy) { return posix_memalign(p, 512, n) ? 207001 : 0; }",
    "aclrtMallocHost": "int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 512, n) ? 207001 : 0; }",
    "aclrtFree": "int aclrtFree(void *p) { free(p); return 0; }",
    "aclrtFreeHost": "int aclrtFreeHost(void *p) { free(p); return 0; }",
    "aclrtMemcpy": "int aclrtMemcpy(void *d, size_t m, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "aclrtMemcpyAsync": "int aclrtMemcpyAsync(void *d, size_t m, const void *s, size_t n, int k, void *t) { memcpy(d, s, n); return 0; }",
    "aclrtMemset": "int aclrtMemset(void *p, size_t m, int v, size_t n) { memset(p, v, n); return 0; }",
    "aclrtGetMemInfo": "int aclrtGetMemInfo(int a, size_t *f, size_t *t) { *f = *t = 64ull << 30; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910_9391"; }',
    "aclrtDeviceCanAccessPeer": "int aclrtDeviceCanAccessPeer(int *c, int a, int b) { *c = 1; return 0; }",
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "a stand-in for CANN"; }',
    "aclAppLog": "void aclAppLog(int a, ...) {}",
    "aclGetDeviceCapability": "int aclGetDeviceCapability(unsigned d, int a, long *v) { *v = 1; return 0; }",
    "aclCreateDataBuffer": "void *aclCreateDataBuffer(void *p, size_t n) { return malloc(8); }",
    "aclCreateTensorDesc": "void *aclCreateTensorDesc() { return malloc(8); }",
    "aclopCreateAttr": "void *aclopCreateAttr() { return malloc(8); }",
    "aclopCompileAndExecute": "int aclopCompileAndExecute(void) { return 500001; }",
    "aclrtReserveMemAddress": "int aclrtReserveMemAddress(void **p) { return 107002; }",
    "aclrtGetFunctionAddr": "int aclrtGetFunctionAddr(void) { return 107002; }",
    "aclrtQueryEventStatus": "int aclrtQueryEventStatus(void *e, int *s) { *s = 1; return 0; }",
    "aclrtQueryEventWaitStatus": "int aclrtQueryEventWaitStatus(void *e, int *s) { *s = 1; return 0; }",
    "aclrtStreamQuery": "int aclrtStreamQuery(void *e, int *s) { *s = 1; return 0; }",
    "aclrtGetSysParamOpt": "int aclrtGetSysParamOpt(int o, long *v) { *v = 0; return 0; }",
    "aclrtCtxGetSysParamOpt": "int aclrtCtxGetSysParamOpt(int o, long *v) { *v = 0; return 0; }",
}
# Looked up while it runs, so not among what the linker asks for; they say that all went well.
LOOKED_UP = [
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtGetStreamAvailableNum",
    "aclrtDestroyStreamForce",
    "aclrtSetOpWaitTimeout",
    "aclrtCtxSetSysParamOpt",
    "aclrtSetStreamFailureMode",
    "aclrtSetDeviceSatMode",
    "aclrtDeviceTaskAbort",
    "aclrtPeekAtLastError",
    "aclrtGetLastError",
    "aclrtResetDeviceForce",
    "aclrtSetSysParamOpt",
    "aclopStartDumpArgs",
    "aclopStopDumpArgs",
    "aclrtGetDeviceUtilizationRate",
    "aclrtSetExceptionInfoCallback",
]
COMPILER = """
#include <stdlib.h>
int aclSetCompileopt(int o, const char *v) { return 0; }
int aclGetCompileopt(int o, char *v, size_t n) { return 0; }
size_t aclGetCompileoptSize(int o) { return 16; }
int aclGenGraphAndDumpForOp(void) { return 0; }
int aclCreateGraphDumpOpt(void) { return 0; }
"""


def make(wheel, folder, compiler="gcc"):
    """Compiles the six libraries for the unpacked `wheel` into `folder`; put that into LD_LIBRARY_PATH."""
    written = {**WRITTEN}
    names = [*WRITTEN, *LOOKED_UP, *sorted(wanted(wheel))]
    body = ["#include <stdlib.h>", "#include <string.h>"]
    for name in dict.fromkeys(names):
        if name not in COMPILER:
            body.append(written.get(name) or f"{'long' if name.startswith('Msprof') else 'int'} {name}(void) {{ return 0; }}")
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"libascendcl.so": "\n".join(body), "libacl_op_compiler.so": COMPILER}
    for library in LIBRARIES:
        source = folder / f"{library}.c"
        source.write_text(sources.get(library, "") + "\n")
        command = [compiler, "-shared", "-fPIC", "-w", str(source), f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run(command, check=True, capture_output=True, text=True)


def wanted(wheel):
    """Names that the wheel's libraries want from CANN: undefined there, and defined neither there nor in torch."""
    own = [each for each in (*glob.glob(f"{wheel}/torch_npu/lib/*.so"), *glob.glob(f"{wheel}/torch_npu/_C*.so")) if "atb" not in each]
    torch_root = Path(importlib.util.find_spec("torch").origin).parent
    asked = {name for library in own for name in symbols(library, "--undefined-only")}
    defined = {name for library in (*own, *glob.glob(f"{torch_root}/lib/*.so*")) for name in symbols(library, "--defined-only")}
    return {name for name in asked - defined if "@" not in name and name.startswith(OWN)}


def symbols(library, which):
    lines = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].split("@@")[0] for line in lines if line.split()}


def environment(folder, wheel):
    """Of a process that imports torch_npu by hand: alone, torch would load it on its own import."""
    paths = [str(wheel), *sys.path[1:], os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
