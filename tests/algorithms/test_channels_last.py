import torch


def test_the_weights_are_in_nhwc_order_to_the_end(run):
    final = run({"channels_last": {}, "blurpool": {}, "squeeze_excite": {"min_channels": 16}}).fit()
    kernels = [tensor for tensor in final.values() if tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.shape[2] > 1]
    assert kernels
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in kernels)
    plain = run({}).fit()["module.0.weight"]
    assert not plain.is_contiguous(memory_format=torch.channels_last)


def test_the_run_is_the_same_up_to_rounding(run):
    with_it, plain = run({"channels_last": {}}).fit(), run({}).fit()
    for name, tensor in plain.items():
        torch.testing.assert_close(with_it[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resume_is_exact(assert_resumes):
    assert_resumes({"channels_last": {}}, batch=7)
