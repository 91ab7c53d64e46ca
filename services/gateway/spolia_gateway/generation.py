"""Runs a request on a decode node, and on another when that one dies, as one unbroken stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import grpc

from spolia.v1 import decode_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import Busy, DeadlineExceeded, InvalidRequest, NotSupported, SpoliaError, Unavailable
from spolia_core.reuse import ReuseMode
from spolia_gateway.answer_streams import AnswerBroken, AnswerStreams
from spolia_gateway.answer_terms import AnswerTerms
from spolia_gateway.asking import asked
from spolia_gateway.attempts import Attempts, RetryPolicy, may_succeed_elsewhere
from spolia_gateway.failures import NodeLost, RequestFailed, failure_of, lost, said_inside
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.in_flight import InFlight
from spolia_gateway.metrics import GatewayMetrics, Way
from spolia_gateway.received import Received
from spolia_gateway.requests_in_flight import RequestInFlight
from spolia_gateway.routing import Demand, order_decode_nodes, order_prefill_nodes, queued_tokens
from spolia_gateway.served_models import serves_linked
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView
from spolia_node.tracing import span

MAX_PREFILL_HINTS = 4

log = get_log(__name__)


class Generator:
    """Generations under way at this gateway. Holds nothing for a request but its stream."""

    def __init__(
        self, cluster: ClusterView, channels: ChannelPool, policy: RetryPolicy, metrics: GatewayMetrics
    ) -> None:
        self._cluster = cluster
        self._channels = channels
        self._policy = policy
        self._metrics = metrics
        self._in_flight = InFlight()
        self._answers = AnswerStreams(channels)

    async def close(self) -> None:
        """Ends what it keeps open to nodes."""
        await self._answers.close()

    async def run(
        self, request: GenerationRequest, demand: Demand, progress: RequestInFlight, deadline: Deadline
    ) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """The answer: deltas, then one finish. Closing the iterator ends the work on the decode node.

        Tells `progress` which node works on it.

        Raises what the node raised when the request is at fault; `Busy` or `Unavailable` when no node could take it,
        or take it over; `DeadlineExceeded` when time ran out; `InternalError` for an answer with a gap.
        """
        received, attempts, terms = Received(request.sampling.num_samples), Attempts(self._policy), AnswerTerms()
        while True:
            with span("route", num_attempts=len(attempts.node_ids)) as routing:
                node = await self._next_node(request, demand, received, attempts, terms, deadline)
                routing.set(node=node.node_id, num_queued_tokens=queued_tokens(node.load))
            attempts.begin(node.node_id)
            progress.given_to(node.node_id)
            try:
                async with aclosing(self._attempt(node, request, demand, received, deadline)) as events:
                    async for event in events:
                        if request.mode is ReuseMode.LINKED:
                            _sign(event, node, terms, request)
                        self._count(event, request)
                        yield _answer(event, attempts.node_ids)
                return
            except SpoliaError as error:
                progress.came_back()
                self._note_failure(error, node, request, received)
                if not received.empty:
                    attempts.broke_off(received.num_tokens)
                attempts.failed(error, refusals_cost=received.empty)

    async def _attempt(
        self,
        node: directory_pb2.NodeRecord,
        request: GenerationRequest,
        demand: Demand,
        received: Received,
        deadline: Deadline,
    ) -> AsyncGenerator[decode_pb2.DecodeServiceGenerateResponse, None]:
        """One node's part of the answer, checked to continue what was received; `NodeLost` when it breaks off."""
        work = f"request {request.request_id}"
        deadline.check(work)
        channel = self._channels.get(node.address, "decode")
        resume, taken_over, finished = received.resume(), False, False
        with self._in_flight.hold(node.node_id), self._answers.inbox(node.address) as inbox:
            hints = self._prefill_hints(request, demand)
            message = request.message(hints, resume, answer_stream=inbox.stream, answer_tag=inbox.tag)
            try:
                async with asked(channel, inbox, message, deadline) as how, aclosing(inbox.steps()) as events:
                    self._metrics.count_asked(how)
                    async for event in events:
                        if event.WhichOneof("event") is None:
                            continue  # a newer node says more than this release can pass on
                        finished = _take(event, received)
                        if resume is not None and not taken_over:
                            taken_over = True
                            self._metrics.count_replay(request.tenant_id)
                        yield event
            except AnswerBroken as error:
                if not finished:
                    raise lost(node, work, error.message) from error
            except RequestFailed as error:
                raise error.of(node, work) from error
            except grpc.RpcError as error:
                if not finished:  # the answer is whole; how the connection ended changes nothing
                    raise failure_of(error, node, work) from error
            finally:
                self._metrics.count_answer(Way.SHARED if inbox.stream else Way.OWN, inbox.pace)
        if not finished:
            raise lost(node, work, "it ended its answer without a finish")

    async def _next_node(
        self,
        request: GenerationRequest,
        demand: Demand,
        received: Received,
        attempts: Attempts,
        terms: AnswerTerms,
        deadline: Deadline,
    ) -> directory_pb2.NodeRecord:
        """The best node not yet asked in this round, of the answer's terms if any is; once the client has tokens, waits
        for one to come back.
        """
        while True:
            nodes = self._not_asked(request, attempts)
            if nodes:
                return order_decode_nodes(terms.preferred(nodes), demand, self._in_flight.counts)[0]
            if received.empty or attempts.out_of_patience or deadline.expired:
                deadline.check(f"request {request.request_id}")
                raise attempts.error or _nobody(request)
            try:
                pause = attempts.pause(deadline)
                await self._cluster.wait_for(lambda _: bool(self._not_asked(request, attempts)), pause)
            except DeadlineExceeded:
                attempts.next_round()

    def _not_asked(self, request: GenerationRequest, attempts: Attempts) -> list[directory_pb2.NodeRecord]:
        nodes = request.model.served_by(self._cluster.nodes(directory_pb2.NODE_ROLE_DECODE))
        if request.mode is ReuseMode.LINKED:
            nodes = [node for node in nodes if serves_linked(node.model, force_linked=request.force_linked)]
        return [node for node in nodes if not attempts.was_asked(node.node_id)]

    def _prefill_hints(self, request: GenerationRequest, demand: Demand) -> list[str]:
        nodes = request.model.served_by(self._cluster.nodes(directory_pb2.NODE_ROLE_PREFILL))
        return [node.address for node in order_prefill_nodes(nodes, demand.affinity)[:MAX_PREFILL_HINTS]]

    def _count(self, event: decode_pb2.DecodeServiceGenerateResponse, request: GenerationRequest) -> None:
        if event.HasField("delta"):
            self._metrics.count_tokens(request.tenant_id, len(event.delta.token_ids))
        else:
            self._metrics.count_finish(request.tenant_id, request.mode, event.finish)
            log.info(
                "generation finished",
                request_id=request.request_id,
                num_prompt_tokens=request.prompt.num_tokens,
                num_generated_tokens=event.finish.num_generated_tokens,
            )

    def _note_failure(
        self, error: SpoliaError, node: directory_pb2.NodeRecord, request: GenerationRequest, received: Received
    ) -> None:
        if isinstance(error, NodeLost):
            self._cluster.mark_dead(node.node_id)
        is_the_callers = isinstance(error, InvalidRequest | NotSupported) and not may_succeed_elsewhere(error)
        note = log.debug if is_the_callers or isinstance(error, Busy) else log.warning
        note(
            "attempt failed",
            request_id=request.request_id,
            decode_node=node.node_id,
            num_received_tokens=received.num_tokens,
            error=repr(error),
            said=said_inside(error),
        )


def _take(event: decode_pb2.DecodeServiceGenerateResponse, received: Received) -> bool:
    """Counts an event in; whether it is the finish."""
    if event.HasField("delta"):
        received.take(event.delta)
        return False
    received.check_complete(event.finish)
    return True


def _sign(
    event: decode_pb2.DecodeServiceGenerateResponse,
    node: directory_pb2.NodeRecord,
    terms: AnswerTerms,
    request: GenerationRequest,
) -> None:
    """Takes a node's part in a LINKED answer; its finish then speaks for every node's."""
    terms.take(node)
    if event.HasField("finish"):
        terms.sign(event.finish.reuse, force_linked=request.force_linked)
        if terms.are_mixed:
            log.warning("answer went on under another profile", request_id=request.request_id, decode_node=node.node_id)


def _answer(event: decode_pb2.DecodeServiceGenerateResponse, node_ids: Sequence[str]) -> gateway_pb2.GenerateResponse:
    """The event for the client. A finish names every node that was asked, those that failed first."""
    if event.HasField("delta"):
        return gateway_pb2.GenerateResponse(delta=event.delta)
    answer = gateway_pb2.GenerateResponse(finish=event.finish)
    took_part = dict.fromkeys([*node_ids, *event.finish.reuse.nodes])
    answer.finish.reuse.nodes[:] = took_part
    return answer


def _nobody(request: GenerationRequest) -> Unavailable:
    return Unavailable(
        f"no decode node serves model {request.model.name!r} now", field="model", actual=request.model.name
    )
