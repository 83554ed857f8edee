/* A CUDA driver without a device, for tests: devices, modules, tensor maps and launches. It reads cubins, keeps to the
 * rules of the real one (rules.json: each is refused by its name), and records what was launched, byte for byte.
 * Where it is asked to (executing.c), the source that a binary was compiled from is run in its place.
 *
 * What it shows is that a launch is the one that a binary was compiled for; never that the binary is right. */
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

enum { USUAL_SMEM = 48 << 10, RESERVED_SMEM = 1 << 10, REGISTER_FILE = 65536, EM_CUDA_ = 190 };
/* Attributes of .nv.info sections, as read off cuobjdump: see codegen/backends/binaries/cubin.py. */
enum { NV_REGISTERS = 0x2f, NV_PARAMETER = 0x17, NV_BANK_BYTES = 0x19, NV_BLOCK = 0x10, NV_CLUSTER = 0x3d };

static struct CUctx_st contexts[MOST_DEVICES];
static int capabilities[MOST_DEVICES], sm_counts[MOST_DEVICES], device_count, version = 13000;
static size_t device_bytes = 1ul << 30;
static int l2_bytes = 1 << 20;
static char device_name[256];
__thread CUcontext current;
static launched launches[MOST_LAUNCHES];
static int launch_count, capturing;
static char broken[512];
CUresult lost;

CUresult standin_break(CUresult result, const char *rule) {
    snprintf(broken, sizeof broken, "%s", rule);
    return result;
}
void standin_lose(CUresult result, const char *why) { lost = standin_break(result, why); }

/* ---- for tests ---- */
void standin_begin(const int *capability, const int *sms, int count, int driver_version) {
    device_count = count;
    version = driver_version;
    for (int i = 0; i < count; i++) {
        capabilities[i] = capability[i];
        sm_counts[i] = sms[i];
        contexts[i].device = i;
    }
    current = NULL;
    lost = CUDA_SUCCESS;
    launch_count = capturing = 0;
    broken[0] = 0;
    standin_forget_memory(device_bytes);
    standin_forget_streams();
}
void standin_furnish(size_t memory, int l2, const char *name) {
    device_bytes = memory;
    l2_bytes = l2;
    snprintf(device_name, sizeof device_name, "%s", name);
}
int standin_launches(void) { return launch_count; }
const launched *standin_launch(int index) { return &launches[index % MOST_LAUNCHES]; }
const char *standin_broken(void) { return broken; }
void standin_capture(int on) { capturing = on; }

/* ---- devices and contexts ---- */
CUresult cuInit(unsigned flags) {
    if (!device_count) standin_attach(); /* a child of the process that has the devices */
    return device_count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
CUresult cuDriverGetVersion(int *out) {
    *out = version;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *out) {
    *out = device_count;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *out, int index) {
    if (index < 0 || index >= device_count) return RULE(device);
    *out = index;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *out, int bytes, CUdevice device) {
    if (device_name[0]) snprintf(out, bytes, "%s", device_name);
    else snprintf(out, bytes, "stand-in of sm_%d", capabilities[device]);
    return CUDA_SUCCESS;
}
static int smem_per_block(int device) {
    switch (capabilities[device]) {
    case 80: case 87: return 163 << 10;
    case 90: case 100: case 103: return 227 << 10;
    default: return 99 << 10;
    }
}
CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute which, CUdevice device) {
    if (device < 0 || device >= device_count) return RULE(device);
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *out = capabilities[device] / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *out = capabilities[device] % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *out = sm_counts[device]; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *out = smem_per_block(device); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *out = USUAL_SMEM; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *out = REGISTER_FILE; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *out = smem_per_block(device) + RESERVED_SMEM; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *out = 32; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *out = l2_bytes; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *out = 1024; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *out = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *out = 1024; break;
    default: *out = 1;
    }
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *out, CUdevice device) {
    if (device < 0 || device >= device_count) return RULE(device);
    *out = device_bytes;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *out, CUdevice device) {
    if (device < 0 || device >= device_count) return RULE(device);
    memcpy(out->bytes, "stand-in of a GP", sizeof out->bytes);
    out->bytes[sizeof out->bytes - 1] = (char)('0' + device);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
    if (device < 0 || device >= device_count) return RULE(device);
    *out = &contexts[device];
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *out) {
    *out = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *out) {
    REQUIRE_CONTEXT();
    *out = current->device;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *out, CUlimit limit) {
    *out = 0;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *out) {
    REQUIRE_CONTEXT();
    bool active = capturing || standin_captures(stream);
    *out = active ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute which, CUdeviceptr pointer) {
    *(CUdeviceptr *)out = pointer;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **out) {
#define NAME(code) case code: *out = #code; return CUDA_SUCCESS
    switch (code) {
    NAME(CUDA_SUCCESS); NAME(CUDA_ERROR_INVALID_VALUE); NAME(CUDA_ERROR_OUT_OF_MEMORY); NAME(CUDA_ERROR_NO_DEVICE);
    NAME(CUDA_ERROR_INVALID_DEVICE); NAME(CUDA_ERROR_INVALID_IMAGE); NAME(CUDA_ERROR_INVALID_CONTEXT);
    NAME(CUDA_ERROR_NO_BINARY_FOR_GPU); NAME(CUDA_ERROR_INVALID_HANDLE); NAME(CUDA_ERROR_NOT_FOUND);
    NAME(CUDA_ERROR_NOT_READY); NAME(CUDA_ERROR_ILLEGAL_ADDRESS); NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    NAME(CUDA_ERROR_LAUNCH_FAILED); NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED); NAME(CUDA_ERROR_INVALID_CLUSTER_SIZE); NAME(CUDA_ERROR_UNKNOWN);
    NAME(CUDA_ERROR_ILLEGAL_STATE);
    default: return CUDA_ERROR_INVALID_VALUE;
    }
#undef NAME
}
CUresult cuGetErrorString(CUresult code, const char **out) {
    *out = code ? broken : "no error";
    return CUDA_SUCCESS;
}

/* ---- modules ---- */
typedef struct {
    const char *bytes;
    const Elf64_Shdr *sections;
    const char *names;
    int count;
} image;

static const Elf64_Shdr *find(const image *from, const char *name) {
    for (int i = 0; i < from->count; i++)
        if (!strcmp(from->names + from->sections[i].sh_name, name)) return &from->sections[i];
    return NULL;
}
static unsigned word(const unsigned char *at, int index) {
    unsigned value;
    memcpy(&value, at + 4 * index, 4);
    return value;
}

/* The next attribute of a section that begins at *at; NULL at its end. */
static const unsigned char *next_attribute(const unsigned char **at, const unsigned char *end, int *which, int *bytes) {
    if (*at + 4 > end) return NULL;
    const unsigned char *head = *at;
    bool sized = head[0] == 4;
    *which = head[1];
    *bytes = sized ? head[2] | head[3] << 8 : 2;
    *at = head + 4 + (sized ? *bytes : 0);
    return sized ? head + 4 : head + 2;
}

static void read_entry(const image *from, const Elf64_Shdr *info, CUfunction entry) {
    const unsigned char *at = (const unsigned char *)from->bytes + info->sh_offset, *end = at + info->sh_size, *value;
    int which, bytes;
    while ((value = next_attribute(&at, end, &which, &bytes))) {
        if (which == NV_PARAMETER && bytes == 12) {
            int ordinal = word(value, 1) & 0xffff;
            if (ordinal >= MOST_PARAMETERS) abort();
            entry->offsets[ordinal] = word(value, 1) >> 16;
            entry->sizes[ordinal] = word(value, 2) >> 18;
            if (ordinal >= entry->parameter_count) entry->parameter_count = ordinal + 1;
        } else if (which == NV_BANK_BYTES) {
            entry->bank_bytes = value[0] | value[1] << 8;
        } else if (which == NV_BLOCK) {
            memcpy(entry->block, value, 12);
        } else if (which == NV_CLUSTER) {
            memcpy(entry->cluster, value, 12);
        }
    }
}

static void read_registers(const image *from, unsigned symbol, CUfunction entry) {
    const Elf64_Shdr *info = find(from, ".nv.info");
    const unsigned char *at = (const unsigned char *)from->bytes + info->sh_offset, *end = at + info->sh_size, *value;
    int which, bytes;
    while ((value = next_attribute(&at, end, &which, &bytes)))
        if (which == NV_REGISTERS && bytes >= 8 && word(value, 0) == symbol) entry->registers = word(value, 1);
}

/* Of flags that ptxas 12 and 13 write in other places; whether the arch has a letter (sm_90a) as well. */
static bool runs_on(const Elf64_Ehdr *header, int capability) {
    bool newer = header->e_ident[EI_ABIVERSION] >= 8;
    int arch = newer ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
    bool letter = newer ? header->e_flags & 0x8 : header->e_flags & 0x800;
    return arch == capability || (!letter && arch / 10 == capability / 10 && arch < capability);
}

/* How long an image is: the driver is told its address alone. 0: it is no cubin. */
size_t standin_image_bytes(const void *bytes) {
    const Elf64_Ehdr *header = bytes;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_ident[EI_CLASS] != ELFCLASS64) return 0;
    if (header->e_machine != EM_CUDA_ || !header->e_shnum || !header->e_shoff) return 0;
    const Elf64_Shdr *sections = (const void *)((const char *)bytes + header->e_shoff);
    size_t end = header->e_shoff + header->e_shnum * sizeof *sections;
    size_t programs = header->e_phoff + header->e_phnum * sizeof(Elf64_Phdr);
    if (programs > end) end = programs;
    for (int i = 0; i < header->e_shnum; i++) {
        size_t after = sections[i].sh_offset + sections[i].sh_size;
        if (sections[i].sh_type != SHT_NOBITS && after > end) end = after;
    }
    return end;
}

CUresult cuModuleLoadData(CUmodule *out, const void *bytes) {
    REQUIRE_CONTEXT();
    const Elf64_Ehdr *header = bytes;
    size_t image_bytes = standin_image_bytes(bytes);
    if (!image_bytes) return RULE(image);
    if (!runs_on(header, capabilities[current->device])) return RULE(arch);
    const Elf64_Shdr *sections = (const void *)((const char *)bytes + header->e_shoff);
    const char *names = (const char *)bytes + sections[header->e_shstrndx].sh_offset;
    image from = {bytes, sections, names, header->e_shnum};
    const Elf64_Shdr *table = find(&from, ".symtab");
    if (!table) return RULE(image);
    const Elf64_Sym *symbols = (const void *)(from.bytes + table->sh_offset);
    const char *strings = from.bytes + from.sections[table->sh_link].sh_offset;
    CUmodule module = calloc(1, sizeof *module);
    module->image = memcpy(malloc(image_bytes), bytes, image_bytes);
    module->image_bytes = image_bytes;
    for (unsigned i = 0; i < table->sh_size / sizeof *symbols && module->count < MOST_ENTRIES; i++) {
        const char *name = strings + symbols[i].st_name;
        char section[192];
        snprintf(section, sizeof section, ".nv.info.%s", name);
        const Elf64_Shdr *info = ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC ? find(&from, section) : NULL;
        if (!info) continue;
        CUfunction entry = &module->entries[module->count++];
        snprintf(entry->name, sizeof entry->name, "%s", name);
        entry->device = current->device;
        entry->module = module;
        entry->most_dynamic_smem = USUAL_SMEM;
        read_entry(&from, info, entry);
        read_registers(&from, i, entry);
        snprintf(section, sizeof section, ".nv.shared.%s", name);
        const Elf64_Shdr *smem = find(&from, section);
        int reserved = find(&from, ".nv.shared.reserved.0") ? RESERVED_SMEM : 0;
        if (smem && (int)smem->sh_size > reserved) entry->static_smem = smem->sh_size - reserved;
    }
    *out = module;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    REQUIRE_CONTEXT();
    for (int i = 0; i < module->count; i++)
        if (!strcmp(module->entries[i].name, name)) {
            *out = &module->entries[i];
            return CUDA_SUCCESS;
        }
    return RULE(entry);
}
CUresult cuModuleUnload(CUmodule module) {
    if (lost) return lost;
    free(module->image);
    free(module);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction entry, size_t index, size_t *offset, size_t *bytes) {
    if (index >= (size_t)entry->parameter_count) return RULE(parameter);
    *offset = entry->offsets[index];
    if (bytes) *bytes = entry->sizes[index];
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *out, CUfunction_attribute which, CUfunction entry) {
    if (lost) return lost;
    switch (which) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *out = entry->registers; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *out = entry->static_smem; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *out = entry->most_dynamic_smem; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *out = entry->block[0] ? entry->block[0] : 1024; break;
    default: *out = 0;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction entry, CUfunction_attribute which, int value) {
    if (lost) return lost;
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value + entry->static_smem > smem_per_block(entry->device)) return RULE(smem_limit);
        entry->most_dynamic_smem = value;
    } else if (which == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
        entry->any_cluster = value;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction entry, CUfunc_cache which) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *out, CUfunction entry, const CUlaunchConfig *config) {
    *out = 1;
    return CUDA_SUCCESS;
}

/* ---- tensor maps: their 128 bytes hold what was asked for, so that those of two callers can be compared ---- */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill outside) {
    static const unsigned char type_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    static const unsigned swizzle_bytes[] = {1 << 30, 32, 64, 128};
    if ((size_t)map % 64) return RULE(map_aligned);
    if ((size_t)address % 16) return RULE(map_address);
    if (rank < 1 || rank > 5 || (unsigned)type >= sizeof type_bytes) return RULE(map_rank);
    unsigned char *out = memset(map, 0, sizeof *map);
    memcpy(out, &address, 8);
    cuuint64_t flags = 1ull << 21; /* which callers clear for small tensors on some drivers */
    memcpy(out + 8, &flags, 8);
    for (unsigned i = 0; i < rank; i++) {
        if (shape[i] < 1 || shape[i] > 1ull << 32) return RULE(map_dimension);
        if (box[i] < 1 || box[i] > 256) return RULE(map_box);
        if (steps[i] < 1 || steps[i] > 8) return RULE(map_step);
        memcpy(out + 16 + 8 * i, &shape[i], 8);
        memcpy(out + 88 + 4 * i, &box[i], 4);
        if (i + 1 == rank) continue;
        if (strides[i] % 16 || strides[i] >= 1ull << 40) return RULE(map_stride);
        memcpy(out + 56 + 8 * i, &strides[i], 8);
    }
    unsigned row = box[0] * type_bytes[type];
    if (row % 16 || (swizzle <= 3 && row > swizzle_bytes[swizzle])) return RULE(map_row);
    unsigned char rest[] = {type, rank, interleave, swizzle, promotion, outside, steps[0]};
    memcpy(out + 108, rest, sizeof rest);
    return CUDA_SUCCESS;
}

/* ---- launches ---- */
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction entry, void **parameters, void **extra) {
    REQUIRE_CONTEXT();
    if (entry->device != current->device) return RULE(other_device);
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
        return RULE(grid);
    if (!threads || threads > 1024) return RULE(block);
    if (entry->block[0] && memcmp(block, entry->block, sizeof block)) return RULE(required_block);
    if ((entry->registers + 7) / 8 * 8 * threads > REGISTER_FILE) return RULE(registers);
    int dynamic = config->sharedMemBytes;
    bool raised = entry->most_dynamic_smem > USUAL_SMEM;
    if (dynamic + (raised ? 0 : entry->static_smem) > entry->most_dynamic_smem) return RULE(smem_not_raised);
    launched made = {.device = entry->device, .bank_bytes = entry->bank_bytes, .cluster = {1, 1, 1}};
    made.dynamic_smem = dynamic;
    made.stream = config->hStream;
    memcpy(made.grid, grid, sizeof grid);
    memcpy(made.block, block, sizeof block);
    if (entry->cluster[0]) memcpy(made.cluster, entry->cluster, sizeof made.cluster);
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const CUlaunchAttribute *asked = &config->attrs[i];
        switch (asked->id) {
        case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
            made.cluster[0] = asked->value.clusterDim.x;
            made.cluster[1] = asked->value.clusterDim.y;
            made.cluster[2] = asked->value.clusterDim.z;
            break;
        case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
            made.spread = asked->value.clusterSchedulingPolicyPreference == CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
            break;
        case CU_LAUNCH_ATTRIBUTE_COOPERATIVE: made.cooperative = asked->value.cooperative; break;
        case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
            made.programmatic = asked->value.programmaticStreamSerializationAllowed;
            break;
        default: abort(); /* nothing else is asked for */
        }
    }
    unsigned blocks = made.cluster[0] * made.cluster[1] * made.cluster[2];
    if (blocks > 1 && capabilities[entry->device] < 90) return RULE(cluster_arch);
    if (entry->cluster[0] && memcmp(made.cluster, entry->cluster, sizeof made.cluster)) return RULE(cluster_compiled);
    if (blocks > 8 && !entry->any_cluster) return RULE(cluster_portable);
    for (int i = 0; i < 3; i++)
        if (grid[i] % made.cluster[i]) return RULE(cluster_grid);
    for (int i = 0; i < entry->parameter_count; i++) {
        memcpy(made.bank + entry->offsets[i], parameters[i], entry->sizes[i]);
        memset(made.written + entry->offsets[i], 1, entry->sizes[i]);
    }
    snprintf(made.name, sizeof made.name, "%s", entry->name);
    if (standin_executes() && !standin_is_stream(made.stream)) return RULE(stream);
    launches[__atomic_fetch_add(&launch_count, 1, __ATOMIC_RELAXED) % MOST_LAUNCHES] = made;
    /* Of a graph that others record nothing is known but that it runs nothing yet. */
    return standin_executes() && !capturing ? standin_enqueue(&made, entry) : CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *name, void **out, int wanted, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    static void *self;
    Dl_info mine;
    if (!self && dladdr((void *)cuGetProcAddress_v2, &mine)) self = dlopen(mine.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *out = NULL;
    if (wanted > version) return RULE(version);
    /* Functions are asked for by their base names, and found in the newest form that the asked version has. */
    size_t length = strlen(name);
    bool has_version = length > 3 && name[length - 3] == '_' && name[length - 2] == 'v';
    bool older = !strcmp(name, "cuEventElapsedTime") && wanted < 12080;
    char newest[128];
    snprintf(newest, sizeof newest, "%s_v2", name);
    if (!has_version && !older) *out = dlsym(self, newest);
    if (!has_version && !*out) *out = dlsym(self, name);
    if (status) *status = *out ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS; /* found or not, as the driver's documentation says */
}
