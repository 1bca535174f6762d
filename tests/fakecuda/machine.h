/* The machine that processes share: what settings say of its GPUs, and which of them are up. Both libraries have it. */
#ifndef FAKECUDA_MACHINE_H
#define FAKECUDA_MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_DEVICES = 16, LONGEST_NAME = 64, LONGEST_UUID = 48 };
enum { DEFAULT_GRANULARITY = 2 << 20, DEFAULT_MEMORY = 1 << 30 };

typedef struct {
    uint8_t bytes[16];
} CUuuid;

/* -- settings (machine.c) ------------------------------------------------------------------------------------------ */

size_t setting(const char *name, size_t otherwise);
unsigned machine_number(void); /* FAKECUDA_MACHINE: only processes of one machine share GPUs */
int gpu_count(void);
bool is_mig(void); /* every GPU has one MIG instance, and the driver shows that */
CUuuid gpu_uuid(int gpu);
CUuuid visible_uuid(int gpu); /* that of the instance, where there is one */
void write_uuid(char text[LONGEST_UUID], const char *prefix, CUuuid uuid);

/* -- device nodes (nodes.c) ---------------------------------------------------------------------------------------- */

typedef enum { NODE_CONTROL, NODE_MEMORY } SharedNode; /* nvidiactl, nvidia-uvm */

/* These return a descriptor that the library keeps, -1 where there is no such node or no room for a descriptor. Where
 * FAKECUDA_NODES is not set there are no nodes: the descriptor is of a memfd of that name. */
int open_shared_node(SharedNode node);
int open_gpu_node(int gpu); /* the GPU is up as long as anybody has its node open */

/* Which of its lives a GPU is in that is up, 0 where there are no nodes. Memory of an earlier life is gone. */
unsigned gpu_life(int gpu, int node);

/* -- what is alive on the GPUs, over all processes, as the kernel lists it in /proc/locks (alive.c) ------------------ */

/* Where the locked bytes of a file start says what the file stands for; there are as many as it has bytes of a GPU. A
 * context has one more, so that one that costs nothing can be seen. */
typedef enum { ALIVE_MEMORY = 60, ALIVE_CONTEXT = 61 } AliveKind;

typedef struct {
    size_t bytes;
    size_t files;
} Alive;

uint64_t alive_start(AliveKind kind, int gpu, unsigned life);
void keep_alive(int fd, uint64_t start, size_t size); /* as long as the open file lives */
Alive alive_at(uint64_t start);
size_t used_bytes(int gpu, unsigned life); /* memory and contexts */

/* -- what tests ask the libraries to do wrong (rules.c) -------------------------------------------------------------- */

enum { NO_GPU = -1 };

typedef struct {
    int milliseconds;
    bool hangs;
} Delay;

const char *read_command(void); /* reads how this process was started; returns its name in the log */
Delay delay_of(const char *name, int gpu);
void take_time(Delay delay);
int injected(const char *name, int gpu);
bool is_function(const char *name); /* each library knows its own, and takes the other's name for granted */
void strip_version(char name[LONGEST_NAME], const char *function);

#endif
