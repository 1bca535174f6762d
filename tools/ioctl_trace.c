/* A library for LD_PRELOAD that writes a line for each ioctl on a device file of NVIDIA's driver into the file that the
 * environment variable TRACE_TO names, once it is set: number, command, descriptor and path. `command` is the third word
 * of NV_ESC_RM_CONTROL's argument, in hexadecimal, and 0 for every other ioctl. tools/gpu_probe.py builds and uses it.
 *
 * What libcuda does with a descriptor that it exports tells whether that keeps the GPU initialised. Killing the exporter
 * tells it only where persistence mode is off. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NV_ESC_RM_CONTROL 0x2a /* its argument: hClient, hObject, cmd, … */

static void trace(const char *file, int fd, unsigned number, const void *argument)
{
    char link[64], path[128] = "", line[256];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) <= 0 || !strstr(path, "nvidia"))
        return;
    unsigned command = number == NV_ESC_RM_CONTROL && argument ? ((const unsigned *)argument)[2] : 0;
    int length = snprintf(line, sizeof line, "%u %x %d %s\n", number, command, fd, path);
    int out = open(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (out < 0 || write(out, line, (size_t)length) != length)
        perror(file);
    if (out >= 0)
        close(out);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    const char *file = getenv("TRACE_TO");
    if (file)
        trace(file, fd, request & 0xff, argument);
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
