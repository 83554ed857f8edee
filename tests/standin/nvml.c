/* NVML without a device, for tests: every look at the reasons to slow down moves on to the next line of a file, which
 * says "SM-clock memory-clock milliwatts degrees reasons"; the last one stays. A field of -1 is not supported. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, SM = 1, MEMORY = 2 };

static long now[5];
static int line;

static void look(void) {
    FILE *file = fopen(getenv("TILEWRIGHT_STANDIN_NVML"), "r");
    long read[5];
    for (int i = 0; i <= line && fscanf(file, "%ld %ld %ld %ld %ld", read, read + 1, read + 2, read + 3, read + 4) == 5; i++)
        memcpy(now, read, sizeof now);
    fclose(file);
}
static int tell(long value, unsigned *out) {
    if (value < 0) return NOT_SUPPORTED;
    *out = value;
    return SUCCESS;
}

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    *out = now;
    return strcmp(uuid, getenv("TILEWRIGHT_STANDIN_UUID")) ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetClockInfo(void *device, int which, unsigned *out) {
    look();
    return tell(which == SM ? now[0] : which == MEMORY ? now[1] : -1, out);
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *out) { return look(), tell(now[2], out); }
int nvmlDeviceGetTemperature(void *device, int which, unsigned *out) { return look(), tell(now[3], out); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *out) {
    look();
    line++;
    *out = now[4];
    return SUCCESS;
}
