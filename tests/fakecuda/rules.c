/* What tests ask the libraries to do wrong: calls that fail, take long, or hang. */
#define _GNU_SOURCE
#include "machine.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RULES = 128, LONGEST_COMMAND = 4096, LONGEST_RULES = 4096 };

/* As programs know the function. */
void strip_version(char name[LONGEST_NAME], const char *function)
{
    snprintf(name, LONGEST_NAME, "%s", function);
    char *version = strstr(name, "_v");
    if (version)
        *version = 0;
}

/* -- the rules ---------------------------------------------------------------------------------------------------- */

typedef struct {
    char function[LONGEST_NAME];
    int gpu; /* NO_GPU: whichever */
    int value; /* a status, or milliseconds */
    int nth; /* 0: every call */
    int seen;
} Rule;

typedef struct {
    const char *variable;
    bool has_value;
    char *known; /* the text that these rules were read from */
    Rule rules[MOST_RULES];
    int count;
} Rules;

static Rules failures = {.variable = "FAKECUDA_FAIL", .has_value = true};
static Rules delays = {.variable = "FAKECUDA_SLOW", .has_value = true};
static Rules hangs = {.variable = "FAKECUDA_HANG", .has_value = false};

/* The next field of what `rest` holds, as a number. */
static bool read_number(char **rest, int *number)
{
    char *field = strsep(rest, ":"), *end;
    if (!field || !*field)
        return false;
    *number = (int)strtol(field, &end, 10);
    return !*end;
}

/* "function[@gpu]:value[:nth]", or without a value. */
static bool read_rule(Rule *rule, char *item, bool has_value)
{
    char *rest = item, *gpu = strsep(&rest, ":"), *name = strsep(&gpu, "@");
    *rule = (Rule){.gpu = NO_GPU};
    if (strlen(name) >= sizeof rule->function || !is_function(name))
        return false;
    strcpy(rule->function, name);
    return (!gpu || read_number(&gpu, &rule->gpu)) && (!has_value || read_number(&rest, &rule->value)) &&
           (!rest || read_number(&rest, &rule->nth)) && !rest;
}

/* A test that misspells a name would test nothing, so that ends the process. */
static void read_rules(Rules *rules, const char *text)
{
    char *copy = strdup(text), *rest = copy, *item;
    rules->count = 0;
    while ((item = strsep(&rest, ",")) != NULL) {
        if (!*item)
            continue;
        char whole[LONGEST_NAME];
        snprintf(whole, sizeof whole, "%s", item);
        if (rules->count == MOST_RULES || !read_rule(&rules->rules[rules->count++], item, rules->has_value)) {
            fprintf(stderr, "fakecuda: bad item %s in %s\n", whole, rules->variable);
            abort();
        }
    }
    free(copy);
}

/* Reads them anew, and counts anew, where the text has changed. */
static void refresh(Rules *rules, const char *text)
{
    if (rules->known && !strcmp(rules->known, text))
        return;
    free(rules->known);
    rules->known = strdup(text);
    read_rules(rules, text);
}

static bool matches(Rule *rule, const char *name, int gpu)
{
    if (strcmp(rule->function, name) != 0 || (rule->gpu != NO_GPU && rule->gpu != gpu))
        return false;
    rule->seen++;
    return !rule->nth || rule->nth == rule->seen;
}

static const char *text_of(const Rules *rules)
{
    const char *text = getenv(rules->variable);
    return text ? text : "";
}

/* -- in which processes ------------------------------------------------------------------------------------------- */

static char command[LONGEST_COMMAND + 1]; /* /proc/self/cmdline with spaces */

const char *read_command(void)
{
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, command, LONGEST_COMMAND);
    if (fd >= 0)
        close(fd);
    const char *end = command + (length > 0 ? length : 0), *second = command + strlen(command) + 1;
    const char *program = second < end && (*second != '-' || !strcmp(second, "-c")) ? second : command;
    for (const char *word = command; word < end; word += strlen(word) + 1)
        if (!strcmp(word, "-m") && word + 3 < end) {
            program = word + 3;
            break;
        }
    const char *slash = strrchr(program, '/');
    const char *name = strdup(slash ? slash + 1 : program); /* once in a process */
    for (char *c = command; c + 1 < end; c++)
        if (!*c)
            *c = ' ';
    return name;
}

static bool is_meant(void)
{
    const char *where = getenv("FAKECUDA_FAIL_IN");
    return !where || strstr(command, where);
}

/* -- failures ----------------------------------------------------------------------------------------------------- */

/* With FAKECUDA_FAIL_ONCE, the process that gets to create the file injects, and nobody afterwards. */
static bool may_inject(void)
{
    const char *once = getenv("FAKECUDA_FAIL_ONCE");
    if (!is_meant())
        return false;
    if (!once || !*once)
        return true;
    int fd = open(once, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

/* FAKECUDA_FAIL, or what is in the file FAKECUDA_RULES now: so a test changes the rules of other processes. */
static const char *failures_text(void)
{
    static char text[LONGEST_RULES + 1];
    const char *path = getenv("FAKECUDA_RULES");
    if (!path)
        return text_of(&failures);
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

/* Whatever number a rule says, also one that no header knows. */
int injected(const char *name, int gpu)
{
    refresh(&failures, failures_text());
    int code = 0;
    for (int i = 0; i < failures.count; i++)
        if (matches(&failures.rules[i], name, gpu) && !code && may_inject())
            code = failures.rules[i].value;
    return code;
}

/* -- delays ------------------------------------------------------------------------------------------------------- */

Delay delay_of(const char *name, int gpu)
{
    Delay delay = {0, false};
    refresh(&delays, text_of(&delays));
    refresh(&hangs, text_of(&hangs));
    for (int i = 0; i < delays.count; i++)
        if (matches(&delays.rules[i], name, gpu))
            delay.milliseconds += delays.rules[i].value;
    for (int i = 0; i < hangs.count; i++)
        if (matches(&hangs.rules[i], name, gpu))
            delay.hangs = true;
    return is_meant() ? delay : (Delay){0, false};
}

static void sleep_for(int milliseconds)
{
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    while (nanosleep(&left, &left))
        ; /* a signal does not end it: no call of the driver returns early */
}

/* A call that hangs comes back when the file FAKECUDA_HANG_WHILE is no longer there. */
void take_time(Delay delay)
{
    enum { POLL = 2 };
    const char *path = getenv("FAKECUDA_HANG_WHILE");
    if (delay.milliseconds)
        sleep_for(delay.milliseconds);
    while (delay.hangs && path && !access(path, F_OK))
        sleep_for(POLL);
}
