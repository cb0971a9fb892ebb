"""Every method has the members of its contract; without one, a run would fail after it has started."""

import pytest

from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import DistributionMatching, Objective

CONTRACTS = {"consistency": Objective, "distribution-matching": DistributionMatching}
"MethodInfo.train_step -> the protocol of its methods"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_method_has_every_member_of_its_contract(name: str) -> None:
    method = OBJECTIVES[name]
    contract = CONTRACTS[method.info.train_step]
    members = {member for member in vars(contract) if not member.startswith("_")} | set(contract.__annotations__)
    assert not [member for member in sorted(members) if not hasattr(method(), member)]
    assert len(members) > 7
