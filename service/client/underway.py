"""What is under way: the steps and blocks that have no outcome yet, and under which id each was sent."""

import itertools
from collections import deque
from collections.abc import Iterator

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import wire
from service.client.blocks import Block
from service.client.columns import Look, fill_columns
from service.client.steps import Step


class UnderWay:
    """The steps and blocks of a pipeline that have no outcome yet.

    Attributes:
        live: The steps, but for those that are in a block.
        blocks: The blocks that are whole, by name.
        ready: What is to be sent next. What got its outcome meanwhile, or was broken up, is in it all the same.
        ids: Makes ids that were never used on any stream.
    """

    def __init__(self) -> None:
        self.live: dict[Step, None] = {}
        self.blocks: dict[str, Block] = {}
        self.ready: deque[Step | Block] = deque()
        self.ids = itertools.count(1)
        self._sent: dict[str, Step] = {}

    def __iter__(self) -> Iterator[Step | Block]:
        return itertools.chain(self.live, self.blocks.values())

    def take_block(self, block: Block) -> bool:
        """Takes a block on, ready to be sent; False where it has to go step by step."""
        if block.finished or not block.occupy(str(next(self.ids))):
            return False
        self.blocks[block.name] = block
        self.ready.append(block)
        return True

    def break_up(self, *blocks: Block) -> None:
        """Goes on with the steps that whole blocks stand for, those of them that have no outcome yet, one by one."""
        for block in blocks:
            del self.blocks[block.name]
            for step in block.split():
                if not step.finished:
                    step.line.active = step
                    self.live[step] = None
                    if block.stream:
                        self._sent[step.request_id] = step
                    else:
                        self.ready.append(step)

    def break_up_on(self, stream: int) -> None:
        """Breaks up the blocks that were sent on a stream; on 0 those that were not sent."""
        self.break_up(*[block for block in self.blocks.values() if block.stream == stream])

    def fill(self, request: pb.StepRequest, step: Step, stream: int, now: float) -> None:
        """Writes a step into a request that is sent now, on a stream or (0) as a call of its own."""
        # An id of this attempt, so that an answer to an earlier one is not taken.
        step.request_id = str(next(self.ids))
        step.stream = stream
        self._sent[step.request_id] = step
        wire.fill_step(
            request,
            request_id=step.request_id,
            session_id=step.line.session_id,
            position=step.position,
            shape=step.shape,
            content=step.content,
            timeout=max(step.deadline - now, 1e-3),
            traceparent=step.traceparent,
        )

    def fill_columns(self, columns: pb.StepColumns, look: Look, steps: list[Step | Block], stream: int) -> None:
        """Writes steps and blocks of one look into columns that are sent now."""
        ids, sent = self.ids, self._sent
        for step in steps:
            step.stream = stream
            if isinstance(step, Step):
                step.request_id = name = str(next(ids))
                sent[name] = step
        fill_columns(columns, look, steps)

    def block_of(self, request_id: str) -> Block | None:
        """The whole block that a step of this id would be in."""
        return self.blocks.get(request_id.partition(".")[0])

    def take_sent(self, request_id: str) -> Step | None:
        """The step that was sent under this id, which waits for its answer no more; None where there is none."""
        step = self._sent.pop(request_id, None)
        if step is None and (block := self.block_of(request_id)) is not None:
            self.break_up(block)
            step = self._sent.pop(request_id, None)
        return step

    def take_lost(self, stream: int) -> list[Step]:
        """The steps that were sent on a stream, which wait for their answers on it no more."""
        self.break_up_on(stream)
        lost = [step for step in self._sent.values() if step.stream == stream]
        for step in lost:
            del self._sent[step.request_id]
        return lost
