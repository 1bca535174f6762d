/* Memory of a context: cuMemAlloc, pinned host memory, copies, and what the driver says about a pointer. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { NOT_ZEROED = 0xA5 };

/* -- device memory ------------------------------------------------------------------------------------------------ */

API CUresult cuMemGetInfo_v2(size_t *available, size_t *total)
{
    ENTER(IN_CONTEXT);
    size_t alive = bytes_alive(current_context()->device);
    *total = process.memory;
    *available = alive < process.memory ? process.memory - alive : 0;
    return SUCCESS;
}

API CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size)
{
    ENTER(IN_CONTEXT);
    if (!size || size > process.memory)
        return size ? OUT_OF_MEMORY : INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    size = (size + ALLOCATION_UNIT - 1) / ALLOCATION_UNIT * ALLOCATION_UNIT;
    Block *block;
    CUresult code = new_block(&block, BLOCK_PLAIN, current_context()->device, 0, size);
    if (code)
        return code;
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, block->fd, 0);
    if (start == MAP_FAILED) {
        release_handle(block);
        return OUT_OF_MEMORY;
    }
    memset(start, NOT_ZEROED, size);
    *address = (CUdeviceptr)start;
    add_range((Range){.kind = RANGE_PLAIN, .address = *address, .size = size, .block = block,
                      .context = current_context()});
    return SUCCESS;
}

API CUresult cuMemFree_v2(CUdeviceptr address)
{
    ENTER(IN_CONTEXT);
    Range *range = find_range(RANGE_PLAIN, address);
    if (!range)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    if (is_open_elsewhere(range->block)) { /* undefined with the real driver */
        fputs("fakecuda: cuMemFree of memory that another process has open\n", stderr);
        return INVALID_VALUE;
    }
    remove_range(range);
    return SUCCESS;
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address)
{
    ENTER(IN_CONTEXT);
    const Range *range = range_around(address);
    if (!range || !range->block)
        return NOT_FOUND;
    if (base)
        *base = range->address;
    if (size)
        *size = range->size;
    return SUCCESS;
}

/* -- pinned host memory ------------------------------------------------------------------------------------------- */

static CUresult allocate_host(void **address, size_t size)
{
    if (!size)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return OUT_OF_MEMORY;
    *address = start;
    add_range((Range){.kind = RANGE_HOST, .address = (CUdeviceptr)start, .size = size, .context = current_context()});
    return SUCCESS;
}

API CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags)
{
    ENTER(IN_CONTEXT);
    (void)flags;
    return allocate_host(address, size);
}

API CUresult cuMemAllocHost_v2(void **address, size_t size)
{
    ENTER(IN_CONTEXT);
    return allocate_host(address, size);
}

API CUresult cuMemFreeHost(void *address)
{
    ENTER(IN_CONTEXT);
    Range *range = find_range(RANGE_HOST, (CUdeviceptr)address);
    if (!range)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    remove_range(range);
    return SUCCESS;
}

API CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags)
{
    ENTER(IN_CONTEXT);
    (void)flags;
    if (!address || !size)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    for (const Range *range = ranges; range; range = range->next)
        if (overlaps(range, (CUdeviceptr)address, size))
            return HOST_MEMORY_ALREADY_REGISTERED;
    add_range((Range){.kind = RANGE_REGISTERED, .address = (CUdeviceptr)address, .size = size,
                      .context = current_context()});
    return SUCCESS;
}

API CUresult cuMemHostUnregister(void *address)
{
    ENTER(IN_CONTEXT);
    Range *range = find_range(RANGE_REGISTERED, (CUdeviceptr)address);
    if (!range)
        return HOST_MEMORY_NOT_REGISTERED;
    REFUSED_BY(while_others_capture());
    remove_range(range);
    return SUCCESS;
}

/* -- copies ------------------------------------------------------------------------------------------------------- */

static bool is_possible(const Transfer *transfer)
{
    bool to_device = transfer->kind != DEVICE_TO_HOST;
    bool from_device = transfer->kind == DEVICE_TO_HOST || transfer->kind == DEVICE_TO_DEVICE;
    if (to_device && !is_accessible(transfer->destination, transfer->size, transfer->device, ACCESS_READ_WRITE))
        return false;
    if (from_device && !is_accessible(transfer->source, transfer->size, transfer->reader, ACCESS_READ))
        return false;
    if (!transfer->pinned)
        return true;
    return is_pinned((void *)(to_device ? transfer->source : transfer->destination), transfer->size);
}

/* What the device's engines do, later than the call that asked for it. Memory that is gone by then, or must not be
 * written, is a fault, and a fault is the end of the context: every later call returns it. */
void perform(const Transfer *transfer)
{
    if (process.sticky)
        return;
    if (!is_possible(transfer))
        process.sticky = ILLEGAL_ADDRESS;
    else if (transfer->kind == FILL)
        memset((void *)transfer->destination, transfer->value, transfer->size);
    else
        memmove((void *)transfer->destination, (const void *)transfer->source, transfer->size);
}

/* Addresses that the driver does not know are refused at once. */
static bool is_known(const Transfer *transfer)
{
    return (transfer->kind == DEVICE_TO_HOST || is_device_memory(transfer->destination, transfer->size)) &&
           (transfer->kind == FILL || transfer->kind == HOST_TO_DEVICE ||
            is_device_memory(transfer->source, transfer->size));
}

static CUresult copy_now(Transfer transfer)
{
    return is_known(&transfer) ? do_now(transfer) : INVALID_VALUE;
}

static CUresult copy_later(CUstream stream, Transfer transfer)
{
    return is_known(&transfer) ? enqueue(stream, transfer) : INVALID_VALUE;
}

static Transfer host_to_device(CUdeviceptr destination, const void *source, size_t size)
{
    return (Transfer){.kind = HOST_TO_DEVICE, .destination = destination, .source = (uint64_t)source, .size = size,
                      .pinned = is_pinned(source, size)};
}

static Transfer device_to_host(void *destination, CUdeviceptr source, size_t size)
{
    return (Transfer){.kind = DEVICE_TO_HOST, .destination = (uint64_t)destination, .source = source, .size = size,
                      .pinned = is_pinned(destination, size)};
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr destination, const void *source, size_t size)
{
    ENTER(IN_CONTEXT);
    return copy_now(host_to_device(destination, source, size));
}

API CUresult cuMemcpyDtoH_v2(void *destination, CUdeviceptr source, size_t size)
{
    ENTER(IN_CONTEXT);
    return copy_now(device_to_host(destination, source, size));
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr destination, CUdeviceptr source, size_t size)
{
    ENTER(IN_CONTEXT);
    return copy_now((Transfer){.kind = DEVICE_TO_DEVICE, .destination = destination, .source = source, .size = size});
}

API CUresult cuMemsetD8_v2(CUdeviceptr destination, unsigned char value, size_t size)
{
    ENTER(IN_CONTEXT);
    return copy_now((Transfer){.kind = FILL, .destination = destination, .size = size, .value = value});
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void *source, size_t size, CUstream stream)
{
    ENTER(IN_CONTEXT);
    return copy_later(stream, host_to_device(destination, source, size));
}

API CUresult cuMemcpyDtoHAsync_v2(void *destination, CUdeviceptr source, size_t size, CUstream stream)
{
    ENTER(IN_CONTEXT);
    return copy_later(stream, device_to_host(destination, source, size));
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, size_t size, CUstream stream)
{
    ENTER(IN_CONTEXT);
    return copy_later(stream, (Transfer){.kind = DEVICE_TO_DEVICE, .destination = destination, .source = source,
                                         .size = size});
}

API CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, size_t size, CUstream stream)
{
    ENTER(IN_CONTEXT);
    return copy_later(stream, (Transfer){.kind = FILL, .destination = destination, .size = size, .value = value});
}

/* -- copies between devices --------------------------------------------------------------------------------------- */

/* Each end is accessed by the device of its own context, so the two need no access to each other's memory. */
static Transfer between_peers(CUdeviceptr destination, CUcontext to, CUdeviceptr source, CUcontext from, size_t size)
{
    return (Transfer){.kind = DEVICE_TO_DEVICE, .destination = destination, .source = source, .size = size,
                      .device = to->device, .reader = from->device, .is_between_peers = true};
}

API CUresult cuMemcpyPeer(CUdeviceptr destination, CUcontext to, CUdeviceptr source, CUcontext from, size_t size)
{
    ENTER(IN_CONTEXT);
    if (!is_context(to) || !is_context(from))
        return INVALID_CONTEXT;
    return copy_now(between_peers(destination, to, source, from, size));
}

API CUresult cuMemcpyPeerAsync(CUdeviceptr destination, CUcontext to, CUdeviceptr source, CUcontext from, size_t size,
                               CUstream stream)
{
    ENTER(IN_CONTEXT);
    if (!is_context(to) || !is_context(from))
        return INVALID_CONTEXT;
    return copy_later(stream, between_peers(destination, to, source, from, size));
}
