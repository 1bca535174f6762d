/* What settings say of the GPUs of a machine. */
#define _GNU_SOURCE
#include "machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

size_t setting(const char *name, size_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

unsigned machine_number(void)
{
    return (unsigned)setting("FAKECUDA_MACHINE", 0);
}

int gpu_count(void)
{
    size_t count = setting("FAKECUDA_DEVICES", 1);
    return count > MOST_DEVICES ? MOST_DEVICES : (int)count;
}

bool is_mig(void)
{
    return setting("FAKECUDA_MIG", 0);
}

CUuuid gpu_uuid(int gpu)
{
    CUuuid uuid = {"fakecuda"};
    uuid.bytes[0] = (uint8_t)(0xf0 + gpu); /* so that a short beginning tells them apart */
    uuid.bytes[15] = (uint8_t)gpu;
    return uuid;
}

CUuuid visible_uuid(int gpu)
{
    CUuuid uuid = gpu_uuid(gpu);
    uuid.bytes[14] = is_mig();
    return uuid;
}

void write_uuid(char text[LONGEST_UUID], const char *prefix, CUuuid uuid)
{
    int at = sprintf(text, "%s", prefix);
    for (int i = 0; i < 16; i++)
        at += sprintf(text + at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid.bytes[i]);
}
