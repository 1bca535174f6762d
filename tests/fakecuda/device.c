/* Devices: what they are called, and what they can do. */
#include "fakecuda.h"

#include <stdio.h>

API CUresult cuDeviceGetCount(int *count)
{
    ENTER(INITIALISED);
    *count = process.device_count;
    return SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    ENTER_ON(gpu_of(ordinal), INITIALISED);
    if (!is_device(ordinal))
        return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    snprintf(name, (size_t)length, "FakeCUDA device %d", process.physical[device]);
    return SUCCESS;
}

API CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    snprintf(text, (size_t)length, "0000:%02x:00.0", process.physical[device] + 1);
    return SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    *bytes = process.memory;
    return SUCCESS;
}

/* Whether a device can access memory of another one, or of its own. */
bool can_reach(CUdevice device, CUdevice peer)
{
    return device == peer || !setting("FAKECUDA_NO_PEERS", 0);
}

API CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer)
{
    ENTER(INITIALISED);
    if (!is_device(device) || !is_device(peer))
        return INVALID_DEVICE;
    *can = device != peer && can_reach(device, peer);
    return SUCCESS;
}

/* An H100 to those who ask, except for memory pools, which are not modelled; what is not listed is 0.
 * FAKECUDA_NO_EXPORT changes nothing here: on WSL2 the attributes claim support, and only trying tells. */
static const struct {
    int attribute, value;
} attributes[] = {
    {1 /* MAX_THREADS_PER_BLOCK */, 1024},
    {10 /* WARP_SIZE */, 32},
    {16 /* MULTIPROCESSOR_COUNT */, 132},
    {41 /* UNIFIED_ADDRESSING */, 1},
    {75 /* COMPUTE_CAPABILITY_MAJOR */, 9},
    {76 /* COMPUTE_CAPABILITY_MINOR */, 0},
    {102 /* VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED */, 1},
    {103 /* HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */, 1},
    {110 /* GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED */, 1},
    {116 /* GPU_DIRECT_RDMA_SUPPORTED */, 1},
};

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    enum { COMPUTE_MODE = 20, PCI_BUS_ID = 33 };
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    *value = attribute == PCI_BUS_ID     ? process.physical[device] + 1
             : attribute == COMPUTE_MODE ? (int)setting("FAKECUDA_COMPUTE_MODE", 0)
                                         : 0;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i].attribute == attribute)
            *value = attributes[i].value;
    return SUCCESS;
}
