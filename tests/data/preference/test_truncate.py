"""What the limits leave of a pair."""

import numpy as np
import pytest

from easydel.data.faults import BadRow
from easydel.data.preference.truncate import Limits, truncate_tree
from easydel.data.tree import Branch, PromptTree

pytestmark = pytest.mark.usefixtures("one_renderer")


@pytest.mark.parametrize("limits", [Limits(None, None, 2, "keep_end"), Limits(4, None, None, "keep_end")])
def test_a_completion_that_would_keep_no_scored_token_is_a_fault(limits):
    prompt, chosen, rejected = [np.array(ids, np.int32) for ids in ([1, 2], [3, 4, 5], [6])]
    branches = Branch(chosen, np.array([False, False, True])), Branch(rejected, np.array([True]))
    with pytest.raises(BadRow, match='none of the 2 tokens that are left of "chosen" carries loss') as fault:
        truncate_tree(PromptTree(prompt, branches), limits, None)
    assert (fault.value.field, fault.value.reason) == ("chosen", "completion truncated to nothing")
