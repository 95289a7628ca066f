import pytest

from tests.service.client.gateways import AsyncFace, BlockingFace, GatewayThread, LoopThread, Proxy


@pytest.fixture(scope="module")
def threads():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def start_gateway(threads):
    """Starts gateways; they end with the test."""
    started = []

    def start(**options):
        started.append(GatewayThread(threads, **options))
        return started[-1]

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def start_proxy(threads, start_gateway):
    """Starts proxies in front of gateways; they end with the test, before their gateways."""
    started = []

    def start(gateway):
        started.append(Proxy(threads, gateway.port))
        return started[-1]

    yield start
    for proxy in started:
        proxy.close()


@pytest.fixture(params=[BlockingFace, AsyncFace], ids=["blocking", "asyncio"])
def connect(request, threads, start_gateway, start_proxy):
    """Connects clients, of both kinds in turn; they end with the test, before what they are connected to."""
    clients = []

    def start(target, **options):
        clients.append(request.param(threads, target, **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def gateway(start_gateway):
    return start_gateway()


@pytest.fixture
def proxy(start_proxy, gateway):
    return start_proxy(gateway)


@pytest.fixture
def client(connect, gateway):
    return connect(gateway.target, timeout=20)
