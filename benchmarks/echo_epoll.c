/* The floor for an echo server, and the load for all of them.
 *
 *   echo_epoll serve [ADDRESS]            listens on 127.0.0.1, prints the port, echoes until killed; one thread, level-triggered epoll
 *   echo_epoll load PORT CONNECTIONS BYTES MESSAGES     ping-pong: each connection has one message under way; prints microseconds
 *
 * Compiled by benchmarks/runtime_net.py. Sources: epoll(7), tcp(7).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, BUFFER = 256 * 1024, FDS = 65536 };

static char buffer[BUFFER];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void nodelay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void send_all(int fd, const char *data, size_t left) {
    while (left) {
        ssize_t n = send(fd, data, left, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) continue;
        if (n <= 0) return;
        data += n;
        left -= (size_t)n;
    }
}

static int serve(void) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof where;
    if (listener < 0 || poll < 0 || bind(listener, (struct sockaddr *)&where, size) || listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&where, &size);
    printf("%d\n", ntohs(where.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) { /* until killed */
        int n_events = epoll_wait(poll, events, EVENTS, -1);
        for (int i = 0; i < n_events; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                int accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (accepted < 0) continue;
                nodelay(accepted);
                event.data.fd = accepted;
                epoll_ctl(poll, EPOLL_CTL_ADD, accepted, &event);
                continue;
            }
            ssize_t n = recv(fd, buffer, sizeof buffer, 0);
            if (n > 0) send_all(fd, buffer, (size_t)n);
            else if (n == 0 || errno != EAGAIN) close(fd);
        }
    }
}

static int load(int port, int n_connections, size_t n_bytes, long n_messages) {
    static size_t got[FDS];
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN}, events[EVENTS];
    char *message = malloc(n_bytes);
    memset(message, 'x', n_bytes);
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < n_connections; i++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&where, sizeof where)) die("connect");
        nodelay(fd);
        event.data.fd = fd;
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
        send_all(fd, message, n_bytes);
    }
    for (long done = 0; done < n_messages;) {
        int n_events = epoll_wait(poll, events, EVENTS, 10000);
        if (n_events <= 0) die("no answer");
        for (int i = 0; i < n_events; i++) {
            int fd = events[i].data.fd;
            ssize_t n = recv(fd, buffer, sizeof buffer, 0);
            if (n <= 0) die("recv");
            got[fd] += (size_t)n;
            if (got[fd] < n_bytes) continue;
            got[fd] -= n_bytes;
            done++;
            send_all(fd, message, n_bytes);
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%ld\n", (end.tv_sec - begin.tv_sec) * 1000000 + (end.tv_nsec - begin.tv_nsec) / 1000);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "serve")) return serve();
    if (argc == 6 && !strcmp(argv[1], "load")) return load(atoi(argv[2]), atoi(argv[3]), (size_t)atol(argv[4]), atol(argv[5]));
    fprintf(stderr, "usage: echo_epoll serve | echo_epoll load PORT CONNECTIONS BYTES MESSAGES\n");
    return 2;
}
