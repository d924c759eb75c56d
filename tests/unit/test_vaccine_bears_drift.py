"""The behaviour that Vaccine claims, on a model that is trained in a second."""

from __future__ import annotations

from immunity.fit import Fit, fit
from immunity.hidden import sites
from immunity.losses import nll
from immunity.methods.sft import SFT
from immunity.methods.vaccine import Vaccine
from immunity.testing import tiny
from immunity.theta import Theta
from immunity.transforms import drifted


def test_after_training_the_loss_under_drift_is_lower_than_sfts():
    rows = [tiny.batch(6, seed=20 + i, role="alignment", lengths=(8, 14)) for i in range(3)]

    def trained(method):
        network = tiny.llama(seed=2)
        fit(network, method.gradient, {"alignment": lambda step: rows[step % 3]}, Fit(steps=80, lr=1e-2, seed=1))
        theta, places = Theta(network), sites(network, "attention")
        return [sum(theta.value(drifted(nll, rho, places), batch) for batch in rows) / 3 for rho in (0.0, 2.0, 4.0)]

    plain, borne = trained(SFT()), trained(Vaccine(rho=2.0))
    assert max(plain[0], borne[0]) < 0.05, "both have learnt the rows"
    assert borne[1] < 0.5 * plain[1], "the drift that it was trained under hurts it less"
    assert borne[2] < 0.5 * plain[2], "and one twice as long"
