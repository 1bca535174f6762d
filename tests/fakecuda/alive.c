/* What is alive on the GPUs, over all processes.
 *
 * Read locks on the open files of memfds: they go with the last descriptor and mapping, whoever is killed. */
#define _GNU_SOURCE
#include "machine.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

uint64_t alive_start(AliveKind kind, int gpu, unsigned life)
{
    enum { LIFE = 46 }; /* above the numbers of machines and GPUs */
    return (1ULL << kind) + ((uint64_t)life << LIFE) + (uint64_t)machine_number() * MOST_DEVICES + (uint64_t)gpu;
}

void keep_alive(int fd, uint64_t start, size_t size)
{
    struct flock shared = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = (off_t)start, .l_len = (off_t)size};
    if (fcntl(fd, F_OFD_SETLK, &shared)) {
        perror("fakecuda: cannot lock a memfd");
        abort();
    }
}

static FILE *open_locks(void)
{
    FILE *locks = fopen("/proc/locks", "re");
    if (!locks) {
        perror("fakecuda: cannot read /proc/locks");
        abort();
    }
    return locks;
}

static bool read_lock(FILE *locks, uint64_t *inode, uint64_t *start, uint64_t *end)
{
    char line[256];
    while (fgets(line, sizeof line, locks))
        if (sscanf(line, "%*s OFDLCK %*s READ %*s %*x:%*x:%lu %lu %lu", inode, start, end) == 3)
            return true;
    return false;
}

static Alive list_alive(uint64_t wanted)
{
    FILE *locks = open_locks();
    uint64_t *seen = NULL, start, end, inode;
    Alive alive = {0, 0};
    while (read_lock(locks, &inode, &start, &end)) {
        bool again = start != wanted;
        for (size_t i = 0; i < alive.files && !again; i++)
            again = seen[i] == inode; /* CUDA IPC opens a file a second time */
        if (again)
            continue;
        seen = realloc(seen, (alive.files + 1) * sizeof *seen);
        seen[alive.files++] = inode;
        alive.bytes += end - start + 1;
    }
    fclose(locks);
    free(seen);
    return alive;
}

/* The kernel lists locks a page at a time; one that comes or goes in between, of any process, can hide others. So this
 * believes what it has seen twice. */
Alive alive_at(uint64_t start)
{
    Alive before, now = list_alive(start);
    do {
        before = now;
        now = list_alive(start);
    } while (now.bytes != before.bytes || now.files != before.files);
    return now;
}

size_t used_bytes(int gpu, unsigned life)
{
    Alive contexts = alive_at(alive_start(ALIVE_CONTEXT, gpu, life));
    return alive_at(alive_start(ALIVE_MEMORY, gpu, life)).bytes + contexts.bytes - contexts.files;
}
