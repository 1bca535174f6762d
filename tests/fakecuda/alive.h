/* What is alive on the GPUs of a machine, over all processes, as the kernel lists it in /proc/locks. Shared by the
 * doubles of libcuda and of libnvidia-ml. */
#ifndef FAKECUDA_ALIVE_H
#define FAKECUDA_ALIVE_H

#include <stddef.h>
#include <stdint.h>

enum { MOST_DEVICES = 16 };

/* Where the locked bytes of a file start says what the file stands for; there are as many as it has bytes of a GPU. A
 * context has one more, so that one that costs nothing can be seen. */
typedef enum { ALIVE_MEMORY = 60, ALIVE_CONTEXT = 61 } AliveKind;

typedef struct {
    size_t bytes; /* of the GPU */
    size_t files;
} Alive;

uint64_t alive_start(AliveKind kind, unsigned machine, int gpu);
void keep_alive(int fd, uint64_t start, size_t size); /* as long as the open file lives */
Alive alive_at(uint64_t start);
size_t used_bytes(unsigned machine, int gpu); /* memory and contexts */

#endif
