/* How every call begins: the log, injected failures, fork, and what the call needs. One lock serialises all calls. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LONGEST_NAME = 64, MOST_RULES = 128, LONGEST_COMMAND = 4096, LONGEST_RULES = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* -- this process, as people know it ------------------------------------------------------------------------------ */

static char command[LONGEST_COMMAND + 1]; /* /proc/self/cmdline with spaces */
static char tag[LONGEST_NAME]; /* the module after -m, or else the name of the script or program */

static void set_tag(const char *word)
{
    const char *name = strrchr(word, '/');
    snprintf(tag, sizeof tag, "%s", name ? name + 1 : word);
    for (char *c = tag; *c; c++)
        if (*c == ' ')
            *c = '_';
}

static void read_command(void)
{
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, command, LONGEST_COMMAND);
    if (fd >= 0)
        close(fd);
    const char *end = command + (length > 0 ? length : 0), *second = command + strlen(command) + 1;
    set_tag(second < end && (*second != '-' || !strcmp(second, "-c")) ? second : command);
    for (const char *word = command; word < end; word += strlen(word) + 1)
        if (!strcmp(word, "-m") && word + 3 < end) {
            set_tag(word + 3);
            break;
        }
    for (char *c = command; c + 1 < end; c++)
        if (!*c)
            *c = ' ';
}

/* -- the log ------------------------------------------------------------------------------------------------------ */

/* Opened anew for each line: a descriptor kept open would be in the way of tests that count or close them. */
static void log_call(const char *name, bool after_fork)
{
    const char *path = getenv("FAKECUDA_LOG");
    if (!path || !*path || !strcmp(name, "cuGetProcAddress")) /* cuda-bindings looks some 500 functions up at once */
        return;
    char line[256];
    int length =
        snprintf(line, sizeof line, "%d %s %s%s\n", getpid(), tag, name, after_fork ? " after-fork" : "");
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, (size_t)length) != length)
        fprintf(stderr, "fakecuda: cannot write to FAKECUDA_LOG=%s\n", path);
    if (fd >= 0)
        close(fd);
}

/* -- injected failures -------------------------------------------------------------------------------------------- */

typedef struct {
    char function[LONGEST_NAME];
    int code, nth; /* nth 0: every call */
    int seen;
} Rule;

static Rule rules[MOST_RULES];
static int rule_count;

/* Reads "name:code[:nth],…". A test that misspells a name would test nothing, so that ends the process. */
static void read_rules(const char *text)
{
    char *copy = strdup(text), *rest = copy, *item;
    rule_count = 0;
    while ((item = strsep(&rest, ",")) != NULL) {
        if (!*item)
            continue;
        Rule rule = {.nth = 0};
        int fields = sscanf(item, "%63[^:]:%d:%d", rule.function, &rule.code, &rule.nth);
        if (fields < 2 || !find_function(rule.function) || rule_count == MOST_RULES) {
            fprintf(stderr, "fakecuda: bad item %s in FAKECUDA_FAIL\n", item);
            abort();
        }
        rules[rule_count++] = rule;
    }
    free(copy);
}

/* With FAKECUDA_FAIL_ONCE, the process that gets to create the file injects, and nobody afterwards. */
static bool may_inject(void)
{
    const char *where = getenv("FAKECUDA_FAIL_IN"), *once = getenv("FAKECUDA_FAIL_ONCE");
    if (where && !strstr(command, where))
        return false;
    if (!once || !*once)
        return true;
    int fd = open(once, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

/* FAKECUDA_FAIL, or what is in the file FAKECUDA_RULES now: so a test changes the rules of other processes. */
static const char *rules_text(void)
{
    static char text[LONGEST_RULES + 1];
    const char *path = getenv("FAKECUDA_RULES"), *given = getenv("FAKECUDA_FAIL");
    if (!path)
        return given ? given : "";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, LONGEST_RULES);
    if (length < 0) {
        fprintf(stderr, "fakecuda: cannot read FAKECUDA_RULES=%s\n", path);
        abort();
    }
    close(fd);
    text[length] = 0;
    return text;
}

static CUresult injected(const char *name)
{
    static char *known;
    const char *text = rules_text();
    if (!known || strcmp(known, text) != 0) { /* the first call, or a test has changed the rules: count anew */
        free(known);
        known = strdup(text);
        read_rules(text);
    }
    CUresult code = SUCCESS;
    for (int i = 0; i < rule_count; i++) {
        if (strcmp(rules[i].function, name) != 0)
            continue;
        rules[i].seen++;
        if (!code && (!rules[i].nth || rules[i].nth == rules[i].seen) && may_inject())
            code = (CUresult)rules[i].code;
    }
    return code;
}

/* -- entering ----------------------------------------------------------------------------------------------------- */

CUresult enter_call(Call *call, const char *function, Needs needs)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_command);
    char name[LONGEST_NAME]; /* as programs know it, without version */
    snprintf(name, sizeof name, "%s", function);
    char *version = strstr(name, "_v");
    if (version)
        *version = 0;
    bool after_fork = process.initialised_in && process.initialised_in != getpid();
    log_call(name, after_fork);
    if (after_fork) /* not even the lock: another thread may have held it when this process was forked */
        return needs == ANYTIME ? SUCCESS : NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    call->locked = true;
    CUresult code = injected(name);
    if (code)
        return code;
    if (needs >= INITIALISED && !process.initialised_in)
        return NOT_INITIALIZED;
    if (needs >= HEALTHY && process.sticky)
        return process.sticky;
    if (needs >= IN_CONTEXT && !current_context())
        return INVALID_CONTEXT;
    if (needs >= IN_CONTEXT && !current_context()->retained)
        return CONTEXT_IS_DESTROYED;
    return SUCCESS;
}

void leave_call(Call *call)
{
    if (call->locked)
        pthread_mutex_unlock(&lock);
}
