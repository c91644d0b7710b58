def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; leave these out with -m 'not slow'")
