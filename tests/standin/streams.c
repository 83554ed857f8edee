/* Streams, events and graphs of the stand-in, in a clock of its own: what a launch costs is said by a test, all else
 * follows. Work is done when it is enqueued; when it would have begun and ended is written down. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "standin.h"

enum { MOST_HANDLES = 1 << 16 };
static const double ENQUEUE_NS = 2000, REPLAY_NS = 4000, FILL_NS = 1000, FILL_NS_PER_BYTE = 0.0005;

typedef struct {
    launched launch;
    CUfunction entry; /* NULL: memory is filled */
    CUdeviceptr at;
    unsigned char value;
    size_t bytes;
} node;

struct CUgraph_st {
    node *nodes;
    size_t count, room;
};
struct CUgraphExec_st {
    struct CUgraph_st graph;
};
struct CUstream_st {
    CUstream handle; /* of streams that this driver did not make: torch's, or a test's */
    bool destroyed, hangs, spoiled;
    double free_at_ns;
    CUgraph captured; /* while it is captured */
    CUstreamCaptureMode mode;
};
struct CUevent_st {
    CUstream stream;
    bool recorded, untimed;
    double at_ns;
};

static CUstream streams[MOST_HANDLES];
static CUevent events[MOST_HANDLES];
static int stream_count, event_count;
static double now_ns;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* never held while Python runs */

void standin_forget_streams(void) {
    pthread_mutex_lock(&lock);
    stream_count = event_count = 0; /* what tests still hold is left to them */
    now_ns = 0;
    pthread_mutex_unlock(&lock);
}

static CUstream add_stream(CUstream handle) {
    if (stream_count == MOST_HANDLES) abort();
    CUstream made = calloc(1, sizeof *made);
    made->handle = handle ? handle : made;
    return streams[stream_count++] = made;
}

/* The stream of a handle. The default stream, and one that another library made, begin when they are first seen. */
static CUstream find_stream(CUstream handle) {
    if (!handle) handle = CU_STREAM_LEGACY;
    pthread_mutex_lock(&lock);
    CUstream found = NULL;
    for (int i = 0; i < stream_count && !found; i++)
        if (streams[i]->handle == handle) found = streams[i];
    if (!found) found = add_stream(handle);
    pthread_mutex_unlock(&lock);
    return found->destroyed ? NULL : found;
}

static bool is_event(CUevent event) {
    for (int i = 0; i < event_count; i++)
        if (events[i] == event) return true;
    return false;
}

bool standin_is_stream(CUstream handle) { return find_stream(handle) != NULL; }
bool standin_captures(CUstream handle) {
    if (!standin_executes()) return false;
    CUstream stream = find_stream(handle);
    return stream && stream->captured;
}
/* Whether what is unsafe while a stream is captured would be refused. */
bool standin_captures_any(void) {
    for (int i = 0; i < stream_count; i++)
        if (streams[i]->captured && streams[i]->mode != CU_STREAM_CAPTURE_MODE_RELAXED) return true;
    return false;
}
void standin_spoil_captures(void) {
    for (int i = 0; i < stream_count; i++)
        if (streams[i]->captured) streams[i]->spoiled = true;
}

static double later(double one, double other) { return one > other ? one : other; }

static void occupy(CUstream stream, double cost_ns) {
    pthread_mutex_lock(&lock);
    stream->free_at_ns = later(stream->free_at_ns, now_ns) + cost_ns;
    pthread_mutex_unlock(&lock);
}

static void pass_host_time(double ns) {
    pthread_mutex_lock(&lock);
    now_ns += ns;
    pthread_mutex_unlock(&lock);
}

static CUresult await(CUstream stream) {
    while (stream->hangs) pause(); /* until this process is killed, as one is that waits for a kernel without an end */
    pthread_mutex_lock(&lock);
    now_ns = later(now_ns, stream->free_at_ns);
    pthread_mutex_unlock(&lock);
    return lost;
}

CUresult standin_await_all(double transfer_ns) {
    if (standin_captures_any()) {
        standin_spoil_captures();
        return RULE(capture_unsafe);
    }
    for (int i = 0; i < stream_count; i++) await(streams[i]);
    pass_host_time(transfer_ns);
    return lost;
}

static CUresult carry_out(CUstream stream, const node *each) {
    if (stream->hangs || lost) return CUDA_SUCCESS; /* behind what never ends, and after what ended all */
    if (!each->entry) {
        memset((void *)each->at, each->value, each->bytes);
        occupy(stream, FILL_NS + FILL_NS_PER_BYTE * (double)each->bytes);
        return CUDA_SUCCESS;
    }
    double cost_ns = 0;
    int result = standin_execute(&each->launch, each->entry, &cost_ns);
    if (result == HANGS) stream->hangs = true;
    else if (result == CUDA_ERROR_ILLEGAL_ADDRESS || result == CUDA_ERROR_LAUNCH_FAILED) lost = (CUresult)result;
    else if (result) return (CUresult)result;
    occupy(stream, cost_ns);
    return CUDA_SUCCESS;
}

static CUresult enqueue(CUstream handle, const node *each) {
    CUstream stream = find_stream(handle);
    if (!stream->captured) {
        pass_host_time(ENQUEUE_NS);
        return carry_out(stream, each);
    }
    CUgraph graph = stream->captured;
    if (graph->count == graph->room)
        graph->nodes = realloc(graph->nodes, (graph->room = 2 * graph->room + 16) * sizeof *graph->nodes);
    graph->nodes[graph->count++] = *each;
    return CUDA_SUCCESS;
}

CUresult standin_enqueue(const launched *launch, CUfunction entry) {
    node each = {.launch = *launch, .entry = entry};
    return enqueue(launch->stream, &each);
}
CUresult standin_enqueue_fill(CUstream stream, CUdeviceptr at, unsigned char value, size_t bytes) {
    node each = {.at = at, .value = value, .bytes = bytes};
    return enqueue(stream, &each);
}

/* ---- streams ---- */
CUresult cuStreamCreate(CUstream *out, unsigned flags) {
    REQUIRE_CONTEXT();
    pthread_mutex_lock(&lock);
    *out = add_stream(NULL);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream handle) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    stream->destroyed = true;
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream handle) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    if (stream->captured) {
        standin_spoil_captures();
        return RULE(capture_unsafe);
    }
    return await(stream);
}
CUresult cuStreamQuery(CUstream handle) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    return stream->hangs || stream->free_at_ns > now_ns ? RULE(not_ready) : CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    if (!is_event(event)) return RULE(event);
    if (event->recorded) stream->free_at_ns = later(stream->free_at_ns, event->at_ns);
    return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize(void) {
    REQUIRE_CONTEXT();
    return standin_await_all(0);
}

/* ---- events ---- */
CUresult cuEventCreate(CUevent *out, unsigned flags) {
    REQUIRE_CONTEXT();
    pthread_mutex_lock(&lock);
    if (event_count == MOST_HANDLES) abort();
    *out = events[event_count++] = calloc(1, sizeof **out);
    (*out)->untimed = flags & CU_EVENT_DISABLE_TIMING;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream handle) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!is_event(event)) return RULE(event);
    if (!stream) return RULE(stream);
    if (stream->captured) return CUDA_SUCCESS; /* a node that tells nobody the time */
    event->stream = stream;
    event->recorded = true;
    event->at_ns = later(stream->free_at_ns, now_ns);
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    REQUIRE_CONTEXT();
    if (!is_event(event)) return RULE(event);
    if (!event->recorded) return CUDA_SUCCESS;
    while (event->stream->hangs) pause();
    pthread_mutex_lock(&lock);
    now_ns = later(now_ns, event->at_ns);
    pthread_mutex_unlock(&lock);
    return lost;
}
CUresult cuEventQuery(CUevent event) {
    REQUIRE_CONTEXT();
    if (!is_event(event)) return RULE(event);
    bool waits = event->recorded && (event->stream->hangs || event->at_ns > now_ns);
    return waits ? RULE(not_ready) : CUDA_SUCCESS;
}
CUresult cuEventElapsedTime_v2(float *out_ms, CUevent begin, CUevent end) {
    REQUIRE_CONTEXT();
    if (!is_event(begin) || !is_event(end)) return RULE(event);
    if (!begin->recorded || !end->recorded || begin->untimed || end->untimed) return RULE(event_untimed);
    if (cuEventQuery(begin) || cuEventQuery(end)) return RULE(not_ready);
    *out_ms = (float)((end->at_ns - begin->at_ns) * 1e-6);
    return CUDA_SUCCESS;
}
#undef cuEventElapsedTime
CUresult cuEventElapsedTime(float *out_ms, CUevent begin, CUevent end) {
    return cuEventElapsedTime_v2(out_ms, begin, end);
}
CUresult cuEventDestroy_v2(CUevent event) {
    REQUIRE_CONTEXT();
    if (!is_event(event)) return RULE(event);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < event_count; i++)
        if (events[i] == event) events[i--] = events[--event_count]; /* its memory stays: no other gets its handle */
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

/* ---- graphs ---- */
CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    if (stream->handle == CU_STREAM_LEGACY) return RULE(capture_default);
    if (stream->captured) return RULE(capture_twice);
    stream->spoiled = false;
    stream->mode = mode;
    stream->captured = calloc(1, sizeof *stream->captured);
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    if (!stream->captured) return RULE(capture_none);
    *out = stream->spoiled ? NULL : stream->captured;
    stream->captured = NULL;
    return *out ? CUDA_SUCCESS : RULE(capture_spoiled);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    REQUIRE_CONTEXT();
    if (!graph) return RULE(graph);
    CUgraphExec made = calloc(1, sizeof *made);
    made->graph = (struct CUgraph_st){malloc(graph->count * sizeof *graph->nodes), graph->count, graph->count};
    if (graph->count) memcpy(made->graph.nodes, graph->nodes, graph->count * sizeof *graph->nodes);
    *out = made;
    return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec made, CUstream handle) {
    REQUIRE_CONTEXT();
    CUstream stream = find_stream(handle);
    if (!stream) return RULE(stream);
    if (!made) return RULE(graph);
    pass_host_time(REPLAY_NS);
    for (size_t i = 0; i < made->graph.count; i++) {
        CUresult result = carry_out(stream, &made->graph.nodes[i]);
        if (result) return result;
    }
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec made) {
    if (!made) return RULE(graph);
    free(made->graph.nodes);
    free(made);
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    if (!graph) return RULE(graph);
    free(graph->nodes);
    free(graph);
    return CUDA_SUCCESS;
}
