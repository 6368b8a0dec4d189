from tests.hub_server import hub as hub
