/* A libnvidia-ml.so.1 that says what a file says, so that the agent's way through pynvml and ctypes is the
 * real one. The file ($SOLLOL_NVML_STUB) holds "key=value" lines and is read anew at every call:
 *   init=<nvmlReturn>             what nvmlInit answers; with an error every other call fails as well
 *   count=<n>                     how many GPUs there are
 *   <i>.error=<nvmlReturn>        what every call about GPU i answers
 *   <i>.handle_error=<nvmlReturn> what asking for its handle answers
 *   <i>.hang=1                    the call for its memory does not come back while this stands
 *   <i>.<field>=<value>           its uuid, name, total, used, gpu_util, temp, power, limit, clock, width
 *   <i>.<field>=unsupported       that query answers NVML_ERROR_NOT_SUPPORTED
 *   <i>.compute=<pid>:<bytes>,…   <i>.graphics=…   its processes ("-" as bytes: not available)
 * The number in front is the GPU's own; "order=1,0" lists GPUs in another order, or some only. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { HANDLES = 4096, GPUS = 64 };

static int initialised;      /* balanced by nvmlInit and nvmlShutdown */
static int session;          /* handles of an earlier session are invalid */
static struct { int gpu, session; } handles[HANDLES];
static int handle_count;
static int lost[GPUS];       /* the session in which a GPU was lost */

static int conf(const char *key, char *value, size_t size) {
    const char *path = getenv("SOLLOL_NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[4096];
    size_t length = strlen(key);
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) || line[length] != '=') continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(value, size, "%s", line + length + 1);
        found = 1;
    }
    fclose(file);
    return found;
}

static long long number(const char *key, long long otherwise) {
    char value[64];
    return conf(key, value, sizeof value) ? atoll(value) : otherwise;
}

static int driver(void) { return (int)number("init", DRIVER_NOT_LOADED); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int answer = driver();
    if (answer) return answer;
    if (!initialised++) session++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!initialised) return UNINITIALIZED;
    initialised--;
    return SUCCESS;
}

const char *nvmlErrorString(int result) { (void)result; return "an error of the stub"; }

static int up(void) { return initialised ? driver() : UNINITIALIZED; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (up()) return up();
    *count = (unsigned)number("count", 0);
    return SUCCESS;
}

static int gpu_at(unsigned index) {
    char order[256], *place = order;
    if (!conf("order", order, sizeof order)) return (int)index;
    while (index-- && (place = strchr(place, ','))) place++;
    return place ? atoi(place) : -1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    char key[64];
    if (up()) return up();
    if (index >= (unsigned)number("count", 0)) return INVALID_ARGUMENT;
    int gpu = gpu_at(index), error;
    snprintf(key, sizeof key, "%d.handle_error", gpu);
    if ((error = (int)number(key, 0))) return error;
    handles[handle_count % HANDLES].gpu = gpu;
    handles[handle_count % HANDLES].session = session;
    *device = &handles[handle_count++ % HANDLES];
    return SUCCESS;
}

/* Finds a GPU's field; returns what the query is to answer. */
static int field(void *device, const char *name, char *value, size_t size) {
    char key[64];
    int gpu = ((int *)device)[0], error;
    if (up()) return up();
    if (((int *)device)[1] != session) return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%d.error", gpu);
    if ((error = (int)number(key, 0)) == GPU_IS_LOST) lost[gpu % GPUS] = session;
    if (lost[gpu % GPUS] == session) return GPU_IS_LOST; /* for good: only a fresh session finds it again */
    if (error) return error;
    snprintf(key, sizeof key, "%d.%s", gpu, name);
    if (!conf(key, value, size) || !strcmp(value, "unsupported")) return NOT_SUPPORTED;
    return SUCCESS;
}

static int unsigned_field(void *device, const char *name, unsigned *answer) {
    char value[64];
    int error = field(device, name, value, sizeof value);
    if (!error) *answer = (unsigned)atoll(value);
    return error;
}

int nvmlDeviceGetName(void *device, char *name, unsigned size) { return field(device, "name", name, size); }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) { return field(device, "uuid", uuid, size); }

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3]) {
    char value[64], key[64];
    int error;
    snprintf(key, sizeof key, "%d.hang", ((int *)device)[0]);
    while (number(key, 0)) usleep(5000);
    if ((error = field(device, "total", value, sizeof value))) return error;
    memory[0] = strtoull(value, NULL, 10);
    if ((error = field(device, "used", value, sizeof value))) return error;
    memory[2] = strtoull(value, NULL, 10);
    memory[1] = memory[0] - memory[2];
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]) {
    rates[1] = 0;
    return unsigned_field(device, "gpu_util", &rates[0]);
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    return sensor ? INVALID_ARGUMENT : unsigned_field(device, "temp", celsius);
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { return unsigned_field(device, "power", mw); }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *mw) { return unsigned_field(device, "limit", mw); }
int nvmlDeviceGetMaxClockInfo(void *device, int clock, unsigned *mhz) {
    return clock == 2 ? unsigned_field(device, "clock", mhz) : INVALID_ARGUMENT;
}
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *bits) { return unsigned_field(device, "width", bits); }

struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

static int processes(void *device, const char *kind, unsigned *count, struct process *list) {
    char value[4096];
    unsigned found = 0, room = *count;
    int error = field(device, kind, value, sizeof value);
    if (error) return error;
    for (char *entry = strtok(value, ","); entry; entry = strtok(NULL, ","), found++) {
        char *bytes = strchr(entry, ':');
        if (!list || found >= room || !bytes) continue;
        list[found].pid = (unsigned)atoll(entry);
        list[found].used = bytes[1] == '-' ? ~0ULL : strtoull(bytes + 1, NULL, 10);
    }
    *count = found;
    return found && (!list || found > room) ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process *list) {
    return processes(device, "compute", count, list);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, struct process *list) {
    return processes(device, "graphics", count, list);
}
