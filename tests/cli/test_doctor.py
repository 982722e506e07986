from __future__ import annotations

from narrowcast import kernels


def test_doctor_names_cpu_kernels_threads_versions_and_energy(cli):
    report = cli("doctor", "--json").json
    assert report["machine"]["cpu"]
    assert report["kernels"]["instruction_set"] in ("reference", *kernels.TIERS)
    assert set(report["kernels"]["ops"]) == set(kernels.OPS)
    assert report["threads"]["torch"] >= 1
    assert report["versions"]["torch"]["version"].startswith("2.")
    assert report["energy"]["readable"] or report["energy"]["reason"]


def test_a_missing_native_library_is_said_loudly(cli, monkeypatch):
    reasons = {"avx2": "the library was not built"}
    gone = kernels.Capability(isa="reference", available=reasons, forced=None, library=None, threads=1)
    monkeypatch.setattr(kernels, "capability", lambda: gone)
    answer = cli("doctor")
    assert answer.code == 0
    assert "WARNING" in answer.err and "the library was not built" in answer.err
    assert "reference" in answer.out


def test_kernel_names_keep_their_brackets(cli):
    assert "[" in cli("doctor").out
