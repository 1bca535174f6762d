/* What the driver says about a pointer. */
#include "fakecuda.h"

typedef enum {
    ATTRIBUTE_CONTEXT = 1,
    ATTRIBUTE_MEMORY_TYPE = 2,
    ATTRIBUTE_DEVICE_POINTER = 3,
    ATTRIBUTE_HOST_POINTER = 4,
    ATTRIBUTE_IS_MANAGED = 8,
    ATTRIBUTE_DEVICE_ORDINAL = 9,
    ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10,
    ATTRIBUTE_RANGE_START_ADDR = 11,
    ATTRIBUTE_RANGE_SIZE = 12,
    ATTRIBUTE_MAPPED = 13,
    ATTRIBUTE_ALLOWED_HANDLE_TYPES = 14,
    ATTRIBUTE_ACCESS_FLAGS = 16,
} PointerAttribute;

static CUresult answer(void *data, PointerAttribute attribute, CUdeviceptr pointer, const Range *range)
{
    const Block *block = range->block;
    switch (attribute) {
    case ATTRIBUTE_CONTEXT:
        *(CUcontext *)data = range->context;
        return SUCCESS;
    case ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)data = block ? MEMORY_DEVICE : MEMORY_HOST;
        return SUCCESS;
    case ATTRIBUTE_DEVICE_POINTER:
        *(CUdeviceptr *)data = pointer;
        return SUCCESS;
    case ATTRIBUTE_HOST_POINTER:
        *(CUdeviceptr *)data = block ? 0 : pointer;
        return block ? INVALID_VALUE : SUCCESS;
    case ATTRIBUTE_IS_MANAGED:
        *(unsigned *)data = 0;
        return SUCCESS;
    case ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)data = block ? block->device : range->context->device;
        return SUCCESS;
    case ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        *(int *)data = range->kind == RANGE_PLAIN;
        return SUCCESS;
    case ATTRIBUTE_RANGE_START_ADDR:
        *(CUdeviceptr *)data = range->address;
        return SUCCESS;
    case ATTRIBUTE_RANGE_SIZE:
        *(size_t *)data = range->size;
        return SUCCESS;
    case ATTRIBUTE_MAPPED:
        *(int *)data = 1;
        return SUCCESS;
    case ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        *(uint64_t *)data = block ? (uint64_t)block->handle_types : 0;
        return SUCCESS;
    case ATTRIBUTE_ACCESS_FLAGS:
        *(int *)data = block ? access_of(range, current_context() ? current_context()->device : block->device)
                             : ACCESS_READ_WRITE;
        return SUCCESS;
    default:
        return NOT_SUPPORTED;
    }
}

API CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer)
{
    ENTER(HEALTHY);
    const Range *range = range_around(pointer);
    return range ? answer(data, (PointerAttribute)attribute, pointer, range) : INVALID_VALUE;
}

/* As the real driver: a pointer that it does not know is no error here; the answers are zero, and the ordinal is -2. */
static void answer_unknown(void *data, PointerAttribute attribute)
{
    enum { NO_DEVICE_ORDINAL = -2 };
    switch (attribute) {
    case ATTRIBUTE_CONTEXT:
    case ATTRIBUTE_DEVICE_POINTER:
    case ATTRIBUTE_HOST_POINTER:
    case ATTRIBUTE_RANGE_START_ADDR:
    case ATTRIBUTE_RANGE_SIZE:
    case ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        *(uint64_t *)data = 0;
        break;
    default:
        *(int *)data = attribute == ATTRIBUTE_DEVICE_ORDINAL ? NO_DEVICE_ORDINAL : 0;
    }
}

API CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr pointer)
{
    ENTER(HEALTHY);
    const Range *range = range_around(pointer);
    for (unsigned i = 0; i < count; i++) {
        PointerAttribute attribute = (PointerAttribute)attributes[i];
        if (!range || answer(data[i], attribute, pointer, range))
            answer_unknown(data[i], attribute);
    }
    return SUCCESS;
}
