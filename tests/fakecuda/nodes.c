/* The device nodes in the folder FAKECUDA_NODES, and the lives of GPUs.
 *
 * A GPU without persistence mode is up while anybody has its node open, and what is in its memory goes with the last
 * one. A FIFO is like that, and the kernel sees to it, whoever is killed: what was written into one is lost when
 * nobody has it open any more. So the node of a GPU is a FIFO, and in it lies the number of the GPU's life; whoever
 * finds it empty begins the next. */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LONGEST_PATH = 4096, MOST_LIVES = 1 << 14 }; /* as many as alive_start has room for */

static int open_node(const char *name)
{
    const char *folder = getenv("FAKECUDA_NODES");
    if (!folder)
        return memfd_create(name, MFD_CLOEXEC);
    char path[LONGEST_PATH];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
}

int open_shared_node(SharedNode node)
{
    return open_node(node == NODE_CONTROL ? "nvidiactl" : "nvidia-uvm");
}

int open_gpu_node(int gpu)
{
    char name[32];
    snprintf(name, sizeof name, "nvidia%d", gpu);
    return open_node(name);
}

static void must(bool works, const char *what)
{
    if (works)
        return;
    fprintf(stderr, "fakecuda: cannot %s: %s\n", what, strerror(errno));
    abort();
}

/* What lies in the FIFO, which stays there; 0: nothing. */
static unsigned written_life(int node)
{
    int copy[2];
    unsigned life = 0;
    must(!pipe2(copy, O_CLOEXEC), "make a pipe");
    ssize_t length = tee(node, copy[1], sizeof life, SPLICE_F_NONBLOCK);
    must(length == sizeof life || (length < 0 && errno == EAGAIN), "look into the node of a GPU");
    must(length < 0 || read(copy[0], &life, sizeof life) == sizeof life, "read a pipe");
    close(copy[0]);
    close(copy[1]);
    return life;
}

/* The number of the last life is in a file beside the node, which is also the lock of those who begin one. */
unsigned gpu_life(int gpu, int node)
{
    const char *folder = getenv("FAKECUDA_NODES");
    if (!folder)
        return 0;
    char path[LONGEST_PATH];
    snprintf(path, sizeof path, "%s/nvidia%d.lives", folder, gpu);
    int lives = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    must(lives >= 0 && !flock(lives, LOCK_EX), "lock the lives of a GPU");
    unsigned life = written_life(node);
    if (!life) {
        must(pread(lives, &life, sizeof life, 0) >= 0, "read the lives of a GPU");
        life = life % (MOST_LIVES - 1) + 1;
        must(pwrite(lives, &life, sizeof life, 0) == sizeof life, "write the lives of a GPU");
        must(write(node, &life, sizeof life) == sizeof life, "write to the node of a GPU");
    }
    close(lives);
    return life;
}
