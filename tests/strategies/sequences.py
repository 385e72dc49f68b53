"""What every state machine over a strategy's sequences does alike."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule


class Sequences(RuleBasedStateMachine):
    """Has a ``strategy``, and what it holds of each open sequence in ``tokens``."""

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 9))
    def close(self, pick):
        sequence = sorted(self.tokens)[pick % len(self.tokens)]
        self.strategy.close(sequence)
        del self.tokens[sequence]
